"""What only shows when everything was read: images given twice, splits that leak, classes that nobody learns."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from visionmtl.data_check.base import Finding, Problem, Role
from visionmtl.data_check.fingerprint import near_images, same_images
from visionmtl.data_check.survey import Checked, Seen
from visionmtl.data_check.tally import classes_found
from visionmtl.structures import LabelSpace

_Place = tuple[Checked, Seen]
_FIELDS = {"boxes": "boxes", "segmentation": "pixels"}  # where a tally counts the classes of a label field


def judge(checked: Sequence[Checked]) -> list[Finding]:
    """Findings over all data sets that were read. Where only some images were, nothing is said to be absent."""
    found = [*_repeated_ids(checked), *_twins(checked), *_absent(checked)]
    if all(one.was_whole for one in checked if one.data_set.role == "train"):
        found += _untrained(checked)
    return found


def _at(place: _Place, rule: str, field: str, found: str) -> Finding:
    one, seen = place
    return Finding(Problem(rule, field, found), one.data_set.role, one.data_set.name, seen.image_id, seen.file)


def _name(place: _Place) -> str:
    one, seen = place
    return f"{seen.file or seen.image_id} of {one.data_set.role} {one.data_set.name}"


def _repeated_ids(checked: Sequence[Checked]) -> Iterator[Finding]:
    for one in checked:
        first: dict[str, Seen] = {}
        for seen in one.seen:
            other = first.setdefault(seen.image_id, seen)
            if other is not seen:
                yield _at(
                    (one, seen),
                    "image_id_repeated",
                    "image_id",
                    f"{seen.image_id!r} is that of {_name((one, other))} too",
                )


def _twins(checked: Sequence[Checked]) -> Iterator[Finding]:
    places = [(one, seen) for one in checked for seen in one.seen]  # training data first
    fingerprints = [seen.fingerprint for _, seen in places]
    shared: Counter[tuple[Role, str, str]] = Counter()
    for group in same_images([one.digest for one in fingerprints]):
        yield from _same([places[i] for i in group], shared)
    for (role, name, of_other), count in shared.items():
        text = f"{role} {name}: {count} images are also in {role} {of_other}"
        yield Finding(Problem("duplicate_elsewhere", "image", text), role, name)
    for i, j, difference in near_images(fingerprints):
        (one, _), (other, _) = places[i], places[j]
        text = f"nearly the same ({difference:.1f} of 255 grey levels apart) as {_name(places[i])}"
        if one is other:
            yield _at(places[j], "near_duplicate", "image", text)
        elif one.data_set.role != other.data_set.role:
            yield _at(places[j], "near_leak", "image", text)


def _same(group: Sequence[_Place], shared: "Counter[tuple[Role, str, str]]") -> Iterator[Finding]:
    """Of each image that is the same as earlier ones: one finding if its data set has it, one if training data do.

    shared: counts by role, data set and another data set of that role.
    """
    for at, place in enumerate(group):
        one = place[0]
        within = next((other for other in group[:at] if other[0] is one), None)
        trained = next((other for other in group[:at] if other[0].data_set.role == "train"), None)
        if within:
            yield _at(place, "duplicate", "image", f"the same pixels as {_name(within)}")
        if trained and one.data_set.role == "val":
            yield _at(place, "leak", "image", f"the same pixels as {_name(trained)}")
        if not within:
            role, name = one.data_set.role, one.data_set.name
            names = {other.data_set.name for other, _ in group[:at] if other.data_set.role == role}
            shared.update((role, name, of_other) for of_other in names)


def _absent(checked: Sequence[Checked]) -> Iterator[Finding]:
    for one in checked:
        for field, space in one.data_set.provides.items() if one.was_whole else ():
            if not one.tally.labelled[field]:
                yield one.data_set.finding("label_absent", field, f"none of {one.tally.images} images is labelled")
            elif space and one.data_set.role == "train":
                missing = _missing(space, {*_classes(one, field, space)})
                if missing:
                    text = (
                        f"{len(missing)} of {len(space.classes)} classes of {space.name} never occur: {_list(missing)}"
                    )
                    yield one.data_set.finding("class_absent", field, text)


def _untrained(checked: Sequence[Checked]) -> Iterator[Finding]:
    trained: dict[tuple[str, str], set[int]] = defaultdict(set)
    for one in checked:
        for field, space in one.data_set.provides.items():
            if space and one.data_set.role == "train":
                trained[field, space.name].update(_classes(one, field, space))
    for one in checked:
        for field, space in one.data_set.provides.items():
            if space and one.data_set.role == "val":
                classes = [k for k in _classes(one, field, space) if k not in trained[field, space.name]]
                if classes:
                    names = _list([space.classes[k] for k in classes])
                    text = f"{len(classes)} classes of {space.name} occur here, but in no training data: {names}"
                    yield one.data_set.finding("class_untrained", field, text)


def _classes(one: Checked, field: str, space: LabelSpace) -> list[int]:
    return classes_found(getattr(one.tally, _FIELDS[field]), space)


def _missing(space: LabelSpace, known: set[int]) -> list[str]:
    return [name for k, name in enumerate(space.classes) if k not in known]


def _list(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
