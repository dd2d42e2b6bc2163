"""Findings over all data sets: repeated images, leaks between splits, classes without training data."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from visionmtl.data.check.fingerprint import near_images, same_images
from visionmtl.data.check.rules import Finding, Role
from visionmtl.data.check.survey import Checked, Seen

_MAX_NAMES = 12


def all_findings(checked: Sequence[Checked]) -> list[Finding]:
    """Findings over all data sets that were read. Where only some images were, nothing is said to be absent."""
    findings = [*_repeated_ids(checked), *_repeated_images(checked), *_absent(checked)]
    if all(_is_whole(data_set) for data_set in checked if data_set.role == "train"):
        findings += _untrained(checked)
    return findings


def _is_whole(data_set: Checked) -> bool:
    """Whether every image was to be read."""
    return data_set.source is not None and data_set.asked == data_set.images


def _name(data_set: Checked, seen: Seen) -> str:
    return f"{seen.file or seen.image_id} of {data_set.role} {data_set.name}"


def _repeated_ids(checked: Sequence[Checked]) -> Iterator[Finding]:
    for data_set in checked:
        first: dict[str, Seen] = {}
        for seen in data_set.seen:
            earlier = first.setdefault(seen.image_id, seen)
            if earlier is not seen:
                text = f"{seen.image_id!r} is that of {_name(data_set, earlier)} too"
                yield data_set.finding("image_id_repeated", "image_id", text, seen)


def _repeated_images(checked: Sequence[Checked]) -> Iterator[Finding]:
    """Of an image that equals earlier ones: one finding if its data set has it, one if training data do."""
    images = [(data_set, seen) for data_set in checked for seen in data_set.seen]  # training data first
    shared: Counter[tuple[Role, str, str]] = Counter()  # images by role, data set and an earlier one of that role
    for group in same_images([seen.fingerprint.digest for _, seen in images]):
        for at, place in enumerate(group):
            data_set, seen = images[place]
            earlier = [images[other] for other in group[:at]]
            within = next((image for image in earlier if image[0] is data_set), None)
            trained = next((image for image in earlier if image[0].role == "train"), None)
            if within:
                yield data_set.finding("duplicate", "image", f"the same pixels as {_name(*within)}", seen)
            else:
                names = {other.name for other, _ in earlier if other.role == data_set.role}
                shared.update((data_set.role, data_set.name, name) for name in names)
            if trained and data_set.role == "val":
                yield data_set.finding("leak", "image", f"the same pixels as {_name(*trained)}", seen)
    by_name = {(data_set.role, data_set.name): data_set for data_set in checked}
    for (role, name, earlier_name), count in sorted(shared.items()):
        text = f"{role} {name}: {count} image{' is' if count == 1 else 's are'} also in {role} {earlier_name}"
        yield by_name[role, name].finding("duplicate_elsewhere", "image", text)
    for first, second, difference in near_images([seen.fingerprint for _, seen in images]):
        (earlier_set, earlier_seen), (data_set, seen) = images[first], images[second]
        text = f"nearly the same ({difference:.1f} of 255 grey levels apart) as {_name(earlier_set, earlier_seen)}"
        if earlier_set is data_set:
            yield data_set.finding("near_duplicate", "image", text, seen)
        elif earlier_set.role != data_set.role:
            yield data_set.finding("near_leak", "image", text, seen)


def _absent(checked: Sequence[Checked]) -> Iterator[Finding]:
    for data_set in filter(_is_whole, checked):
        for field, space in data_set.provides.items():
            if not data_set.tally.labelled[field]:
                text = f"none of {data_set.tally.images} images is labelled"
                yield data_set.finding("label_absent", field, text)
            elif space and data_set.role == "train":
                occurring = data_set.tally.classes(field, space)
                missing = [name for k, name in enumerate(space.classes) if k not in occurring]
                if missing:
                    count = f"{len(missing)} of {len(space.classes)} classes of {space.name}"
                    verb = "occurs" if len(missing) == 1 else "occur"
                    yield data_set.finding("class_absent", field, f"{count} never {verb}: {_list(missing)}")


def _untrained(checked: Sequence[Checked]) -> Iterator[Finding]:
    trained: dict[tuple[str, str], set[str]] = defaultdict(set)  # lists of one name are matched class by class
    for data_set in checked:  # training data first
        for field, space in data_set.provides.items():
            classes = [space.classes[k] for k in data_set.tally.classes(field, space)] if space else []
            if space and data_set.role == "train":
                trained[field, space.name].update(classes)
            elif space and (untrained := [one for one in classes if one not in trained[field, space.name]]):
                what, verb = ("class", "occurs") if len(untrained) == 1 else ("classes", "occur")
                count = f"{len(untrained)} {what} of {space.name}"
                text = f"{count} {verb} here, but in no training data: {_list(untrained)}"
                yield data_set.finding("class_untrained", field, text)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
