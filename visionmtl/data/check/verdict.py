"""Findings over all data sets: repeated images, leaks between splits, classes without training data."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from visionmtl.data.check.fingerprint import near_images, same_images
from visionmtl.data.check.rules import Finding, Role
from visionmtl.data.check.survey import Checked, Seen

_Place = tuple[Checked, Seen]
_Shared = Counter[tuple[Role, str, str]]  # images by role, data set and another data set of that role


def judge(checked: Sequence[Checked]) -> list[Finding]:
    """Findings over all data sets that were read. Where only some images were, nothing is said to be absent."""
    findings = [*_repeated_ids(checked), *_twins(checked), *_absent(checked)]
    if all(_is_whole(one) for one in checked if one.role == "train"):
        findings += _untrained(checked)
    return findings


def _is_whole(one: Checked) -> bool:
    """Whether every image was to be read."""
    return one.source is not None and one.asked == one.images


def _name(place: _Place) -> str:
    one, seen = place
    return f"{seen.file or seen.image_id} of {one.role} {one.name}"


def _repeated_ids(checked: Sequence[Checked]) -> Iterator[Finding]:
    for one in checked:
        first: dict[str, Seen] = {}
        for seen in one.seen:
            other = first.setdefault(seen.image_id, seen)
            if other is not seen:
                text = f"{seen.image_id!r} is that of {_name((one, other))} too"
                yield one.finding("image_id_repeated", "image_id", text, seen)


def _twins(checked: Sequence[Checked]) -> Iterator[Finding]:
    places = [(one, seen) for one in checked for seen in one.seen]  # training data first
    fingerprints = [seen.fingerprint for _, seen in places]
    shared: _Shared = Counter()
    for group in same_images([fingerprint.digest for fingerprint in fingerprints]):
        yield from _same([places[i] for i in group], shared)
    for one in checked:
        for (role, name, of_other), count in shared.items():
            if (role, name) == (one.role, one.name):
                text = f"{role} {name}: {count} images are also in {role} {of_other}"
                yield one.finding("duplicate_elsewhere", "image", text)
    for i, j, difference in near_images(fingerprints):
        (one, _), (other, seen) = places[i], places[j]
        text = f"nearly the same ({difference:.1f} of 255 grey levels apart) as {_name(places[i])}"
        if one is other:
            yield other.finding("near_duplicate", "image", text, seen)
        elif one.role != other.role:
            yield other.finding("near_leak", "image", text, seen)


def _same(group: Sequence[_Place], shared: _Shared) -> Iterator[Finding]:
    """Of each image that is the same as earlier ones: one finding if its data set has it, one if training data do."""
    for at, (one, seen) in enumerate(group):
        within = next((other for other in group[:at] if other[0] is one), None)
        trained = next((other for other in group[:at] if other[0].role == "train"), None)
        if within:
            yield one.finding("duplicate", "image", f"the same pixels as {_name(within)}", seen)
        if trained and one.role == "val":
            yield one.finding("leak", "image", f"the same pixels as {_name(trained)}", seen)
        if not within:
            names = {other.name for other, _ in group[:at] if other.role == one.role}
            shared.update((one.role, one.name, of_other) for of_other in names)


def _absent(checked: Sequence[Checked]) -> Iterator[Finding]:
    for one in checked:
        for field, space in one.provides.items() if _is_whole(one) else ():
            if not one.tally.labelled[field]:
                yield one.finding("label_absent", field, f"none of {one.tally.images} images is labelled")
            elif space and one.role == "train":
                occur = one.tally.classes(field, space)
                missing = [name for k, name in enumerate(space.classes) if k not in occur]
                if missing:
                    count = f"{len(missing)} of {len(space.classes)} classes of {space.name}"
                    yield one.finding("class_absent", field, f"{count} never occur: {_list(missing)}")


def _untrained(checked: Sequence[Checked]) -> Iterator[Finding]:
    trained: dict[tuple[str, str], set[int]] = defaultdict(set)
    for one in checked:
        for field, space in one.provides.items():
            if space and one.role == "train":
                trained[field, space.name].update(one.tally.classes(field, space))
    for one in checked:
        for field, space in one.provides.items():
            if space and one.role == "val":
                classes = [k for k in one.tally.classes(field, space) if k not in trained[field, space.name]]
                if classes:
                    names = _list([space.classes[k] for k in classes])
                    text = f"{len(classes)} classes of {space.name} occur here, but in no training data: {names}"
                    yield one.finding("class_untrained", field, text)


def _list(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
