"""The result of a check as text for a terminal: what there is, then what was found, the worst first."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from visionmtl.data_check.bars import depth_name
from visionmtl.data_check.base import SEVERITIES, Finding, Severity

_MAX_CLASSES = 20  # lines of a table
_BAR = 30  # characters
_SHOWN = {"error": 3, "warning": 2, "note": 8}  # texts of a group of findings
_MORE_FILES = 5
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_result(console: Console, data_sets: Sequence[Mapping[str, Any]], findings: Sequence[Finding]) -> None:
    """data_sets: see `statistics.statistics`."""
    for one in data_sets:
        _print_data_set(console, one)
    groups = defaultdict(list)
    for finding in findings:
        groups[finding.problem.rule, finding.problem.field, finding.role, finding.data_set].append(finding)
    for severity in SEVERITIES:
        for group in groups.values():
            if group[0].severity == severity:
                _print_group(console, group)
    roles = [(role, sum(one["read"] for one in data_sets if one["role"] == role)) for role in ("train", "val")]
    read = " + ".join(f"{count} {role}" for role, count in roles)
    if any(one["asked"] < (one["images"] or 0) for one in data_sets):
        console.print("\nonly some images were read; what is absent, or twice, can be told of these alone")
    counts = [f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in count_all(findings).items()]
    console.print(f"\n{read} images read: {', '.join(counts)}")


def count_all(findings: Sequence[Finding]) -> dict[Severity, int]:
    """Findings by severity."""
    return {severity: sum(one.severity == severity for one in findings) for severity in SEVERITIES}


def _print_group(console: Console, group: Sequence[Finding]) -> None:
    first = group[0]
    severity = first.severity
    count = f" ({len(group)} times)" if len(group) > 1 else ""
    title = f"{severity}: {first.problem.rule}, {first.role} {first.data_set}{count}"
    console.print(f"\n{title}", style=_COLOURS[severity])
    for one in group[: _SHOWN[severity]]:
        console.print(f"  {one.text}", soft_wrap=True)
    rest = [one.place for one in group[_SHOWN[severity] :]]
    if rest:
        more = f" and {len(rest) - _MORE_FILES} more" if len(rest) > _MORE_FILES else ""
        console.print(f"  also {', '.join(rest[:_MORE_FILES])}{more}", soft_wrap=True)


def _print_data_set(console: Console, one: Mapping[str, Any]) -> None:
    console.print(f"\n{one['role']} {one['name']} ({one['type']})", style="bold")
    if one["images"] is None:
        console.print("  could not be opened, see below")
        return
    unread = f", {one['asked'] - one['read']} could not be read" if one["asked"] > one["read"] else ""
    some = "" if one["asked"] == one["images"] else f" of {one['images']}"
    console.print(f"  {one['read']}{some} images{unread}, {sizes(one['sizes'])}")
    labelled = [f"{name} {count}" for name, count in one["labelled"].items()]
    console.print(f"  labelled: {', '.join(labelled) or 'nothing'}; without any label {one['without_any_label']}")
    for line in summaries(one):
        console.print(f"  {line}", soft_wrap=True)
    for field, unit in (("boxes", "boxes"), ("segmentation", "pixels")):
        if field in one:
            console.print(_class_table(one[field], unit, field))
    if "histogram" in one.get("depth_m", {}):
        console.print("\n".join(f"  {line}" for line in bars(one["depth_m"]["histogram"])))


def sizes(found: Mapping[str, Any]) -> str:
    """ "480x640 px", or the range and the most frequent one."""
    if not found["different"]:
        return "no sizes"
    most = found["most"][0]
    size = f"{most['height']}x{most['width']}"
    if found["different"] == 1:
        return f"all {size} px"
    (low, high), (narrow, wide) = found["height"], found["width"]
    count = f"{found['different']} sizes, most often {size} ({most['images']})"
    return f"{low}..{high} x {narrow}..{wide} px (height x width): {count}"


def summaries(one: Mapping[str, Any]) -> Iterator[str]:
    """A line on each label field."""
    if boxes := one.get("boxes"):
        an_image = boxes["an_image"]
        few, most = f"{an_image['mean']:.1f} (median {an_image['median']})", an_image["max"]
        yield (
            f"boxes: {boxes['total']}, {boxes['crowds']} of them crowds; an image has {few}, at most {most}; "
            f"{boxes['images_without']} have none; "
            f"{boxes['small']} small, {boxes['medium']} medium, {boxes['large']} large"
        )
    if segmentation := one.get("segmentation"):
        yield f"segmentation: {segmentation['labelled_share']:.1%} of the pixels labelled"
    if depth := one.get("depth_m"):
        measured = f"depth_m: {depth['measured_share']:.1%} of the pixels measured"
        if "median_m" in depth:
            measured += (
                f"; {depth['min_m']:.3g} to {depth['max_m']:.4g} m, median {depth['median_m']:.3g}, "
                f"98 % within {depth['p01_m']:.3g} to {depth['p99_m']:.3g}"
            )
        yield measured


def bars(histogram: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of range, bar and share."""
    longest = max(bar["share"] for bar in histogram)
    lines = []
    for bar in histogram:
        length = round(bar["share"] / longest * _BAR)
        lines.append(f"{depth_name(bar):>16} |{'#' * length:<{_BAR}}| {bar['share']:6.1%}")
    return lines


def _class_table(label: Mapping[str, Any], unit: str, title: str) -> Table:
    """The most frequent classes."""
    table = Table(f"{title}: {label['space']}", unit, "images", "share", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    classes = sorted(label["classes"], key=lambda one: -one[unit])
    known = [one for one in classes if one[unit]]
    for one in known[:_MAX_CLASSES]:
        table.add_row(f"  {one['name']}", f"{one[unit]:,}", f"{one['images']:,}", f"{one['share']:.2%}")
    if len(known) > _MAX_CLASSES:
        rest = known[_MAX_CLASSES:]
        total, share = sum(one[unit] for one in rest), sum(one["share"] for one in rest)
        table.add_row(f"  {len(rest)} others", f"{total:,}", "", f"{share:.2%}")
    if len(classes) > len(known):
        table.add_row(f"  {len(classes) - len(known)} never", "0", "0", "")
    return table
