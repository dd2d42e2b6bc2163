"""What a check of data sets can find: the rules, and findings, which say where one of them is broken."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: something false would be learnt or measured; warning: probably not meant; note: worth knowing."""
Role = Literal["train", "val"]

MIN_SIDE_PX = 32  # the stride of the coarsest level of most encoders
MAX_BEYOND_PX = 1.0  # annotation tools round outwards
UNIT_TOLERANCE = 0.02  # of the length of normals: 8 bits a component are at most 0.7 % off


@dataclass(frozen=True)
class Rule:
    """severity, then what is allowed and what to do; both empty where the text found says it all."""

    severity: Severity
    allowed: str = ""
    advice: str = ""


RULES: Mapping[str, Rule] = {
    # a whole data set; the reader's own words
    "not_opened": Rule("error"),
    "told_by_reader": Rule("note"),
    "classes": Rule("error"),
    "classes_taught": Rule("note"),
    "label_absent": Rule(
        "warning", "some image must carry what the data set provides", "correct the paths or leave the label out"
    ),
    "class_absent": Rule("warning", "every class needs examples", "add images of them, or expect no predictions there"),
    "class_untrained": Rule(
        "warning", "classes that are evaluated should be learnt", "add training images, or correct the class mapping"
    ),
    # one file; the reader's own words
    "unreadable": Rule("error"),
    "decoder_warning": Rule(
        "warning", "files are read without complaints", "look at the file; write or fetch it again"
    ),
    # images
    "image_form": Rule("error", "uint8 [H, W, 3] RGB, or [H, W, `channels`], is needed", "convert it in the reader"),
    "image_small": Rule(
        "warning", f"{MIN_SIDE_PX} px or more a side are usual", "check that it is no thumbnail or placeholder"
    ),
    "image_constant": Rule("warning", "a photograph has many colours", "fetch the file again, or remove it"),
    "image_cut": Rule(
        "warning", "data lost in a JPEG leave an even area at the bottom", "look at the file; fetch it again if so"
    ),
    "image_id_repeated": Rule("error", "results name images by their id", "give each image its own"),
    # the same image twice
    "duplicate": Rule("error", "an image counts once", "remove one of the two, with its labels"),
    "duplicate_elsewhere": Rule("note"),
    "leak": Rule(
        "error", "what is evaluated must not be trained on", "remove the image from data.train, or correct the splits"
    ),
    "near_duplicate": Rule("warning", "an image counts once", "look at both; remove one if they are the same"),
    "near_leak": Rule(
        "warning", "what is evaluated must not be trained on", "look at both; remove one if they are the same"
    ),
    # labels of any kind
    "field_unexpected": Rule("error", "`provides` must name every field", "add it to `provides` of the reader"),
    "size_differs": Rule("error", "a label map has its image's size", "make it anew from the original"),
    "form": Rule("error", "see `visionmtl.structures`", "correct the reader"),
    # boxes
    "box_not_finite": Rule("error", "coordinates are numbers", "correct or remove the box"),
    "box_empty": Rule("error", "x1 < x2 and y1 < y2 are needed", "correct or remove the box"),
    "box_outside": Rule("error", "a box overlaps its image", "correct or remove the box; check the image's size"),
    "box_beyond": Rule(
        "warning", f"boxes end within {MAX_BEYOND_PX:g} px of the edge", "clip them, or check the image's size"
    ),
    "box_class": Rule("error", "class ids are positions in the label space", "correct the class mapping"),
    "box_area": Rule("error", "areas are numbers of 0 or more, in px^2", "correct the area or leave it out"),
    "box_repeated": Rule("warning", "an object has one box", "remove the copies"),
    # maps
    "class_outside": Rule(
        "error", "class ids are positions in the label space, 255 = not labelled", "correct the class mapping"
    ),
    "nothing_labelled": Rule(
        "warning",
        "some pixel must be labelled",
        "correct the file, or remove it: not labelled is honest",
    ),
    "depth_not_finite": Rule("error", "metres, 0 = not measured", "store 0 where nothing was measured"),
    "depth_negative": Rule("error", "metres, 0 = not measured", "store 0 where nothing was measured"),
    "depth_implausible": Rule("warning", "metres are expected", "correct the declared unit, unless this is meant"),
    "depth_constant": Rule("warning", "a view has many depths", "make the file anew"),
    "normals_not_finite": Rule("error", "unit vectors, 0 0 0 = unknown", "store 0 0 0 where nothing is known"),
    "normals_length": Rule("error", "unit vectors, 0 0 0 = unknown", "normalise them, or correct how they are decoded"),
}


class Problem(NamedTuple):
    """One rule that a sample breaks, in which of its fields, and how."""

    rule: str
    field: str
    text: str


@dataclass(frozen=True)
class Finding:
    """A problem and its place. `image_id` and `file` are None where it concerns the data set."""

    problem: Problem
    role: Role
    data_set: str
    image_id: str | None = None
    file: str | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return RULES[self.problem.rule].severity

    @property
    def place(self) -> str:
        """The file, or else the image, or else the data set."""
        where = f"{self.role} {self.data_set}"
        return self.file or (where if self.image_id is None else f"{where}, image {self.image_id}")

    @property
    def text(self) -> str:
        """What was found where, what is allowed, what to do."""
        rule, text = RULES[self.problem.rule], self.problem.text
        if not rule.allowed:
            return text
        return f"{self.place}: {self.problem.field}: {text}; {rule.allowed}; {rule.advice}"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "severity": self.severity,
            "rule": self.problem.rule,
            "role": self.role,
            "data_set": self.data_set,
            "image_id": self.image_id,
            "file": self.file,
            "field": self.problem.field,
            "text": self.text,
        }
