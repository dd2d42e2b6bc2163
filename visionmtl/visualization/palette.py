"""Colours for any number of classes."""

import colorsys


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB 0..255 that differ between neighbours: hues a golden angle apart, brightness in three turns."""
    colours = [
        colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.55 + 0.1 * (number % 2), (0.95, 0.75, 0.6)[number % 3])
        for number in range(count)
    ]
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours)
