"""What the values of label files mean: named conventions, and mappings that a user writes down."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pspnet_fast.data import IGNORE_INDEX

Color = tuple[int, int, int]

# The 19 classes of the Cityscapes benchmark in the order of their train ids, by the id that *_labelIds.png hold.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_LAST_ID = 33
# The ids of COCO-Stuff that no pixel has; its label files hold the id - 1.
_COCOSTUFF_GONE = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
# The 32 colours of CamVid's label_colors.txt by the class of the SegNet tutorial's 11 that each belongs to.
_CAMVID_COLORS: tuple[tuple[Color, ...], ...] = (
    ((128, 128, 128),),  # Sky
    ((192, 0, 128), (0, 128, 64), (128, 0, 0), (64, 0, 64), (64, 192, 0)),  # Archway, Bridge, Building, Tunnel, Wall
    ((192, 192, 128), (0, 0, 64)),  # Column_Pole, TrafficCone
    ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # Road, LaneMkgsDriv, LaneMkgsNonDriv
    ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # Sidewalk, ParkingBlock, RoadShoulder
    ((128, 128, 0), (192, 192, 0)),  # Tree, VegetationMisc
    ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # SignSymbol, Misc_Text, TrafficLight
    ((64, 64, 128),),  # Fence
    # Car, SUVPickupTruck, Truck_Bus, Train, OtherMoving
    ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),
    ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),  # Pedestrian, Child, CartLuggagePram, Animal
    ((0, 128, 192), (192, 0, 192)),  # Bicyclist, MotorcycleScooter
)
_CAMVID_VOID: Color = (0, 0, 0)

CONVENTIONS = {
    "index": "the value is the class, 255 is ignored",
    "from_one": "class 0 has the value 1 and so on; 0 and 255 are ignored",
    "ade20k": "ADE20K's files: 1..150 are the classes, 0 is ignored",
    "cityscapes": "*_labelIds.png: of the ids 0..33, the 19 of the benchmark are classes, the others ignored",
    "voc": "Pascal VOC's files: 0..20 are the classes, 255 is ignored",
    "camvid": "CamVid's 11 classes: 0..10, 11 and 255 are ignored; or its 32 colours, where black is ignored",
    "cocostuff": "COCO-Stuff's files, which hold the id - 1: of 0..181 the 171 that occur are classes, 255 is ignored",
    "color": "the colour is that of the class in colors.txt",
}
CLASSES = {
    "ade20k": 150,
    "cityscapes": len(_CITYSCAPES_IDS),
    "voc": 21,
    "camvid": len(_CAMVID_COLORS),
    "cocostuff": 182 - len(_COCOSTUFF_GONE),
}
OTHER = "other"
ORIENTATIONS = ("auto", "turned", "stored")


@dataclass(frozen=True)
class Remap:
    """Classes by value and by colour, and that of all other values (None: they are an error)."""

    values: dict[int, int] = field(default_factory=dict)
    colors: dict[Color, int] = field(default_factory=dict)
    other: int | None = None

    @classmethod
    def parse(cls, mapping: Mapping[object, object]) -> "Remap":
        """Read ``{value: class}``; a key is a value, a colour ``"R G B"`` or ``"other"``, a class may be 255.

        Raises:
            ValueError: a key or class that is none of these, which the message names.
        """
        remap, other = cls(), None
        for key, value in mapping.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= IGNORE_INDEX:
                raise ValueError(
                    f"must give a class or 255 for {key!r}, got {value!r}; YAML wants a blank after colons: {{0: 1}}"
                )
            numbers = [key] if isinstance(key, int) else str(key).split()
            if key == OTHER:
                other = value
            elif all(str(number).isdecimal() for number in numbers) and len(numbers) == 1:
                remap.values[int(numbers[0])] = value
            elif all(str(number).isdecimal() and int(number) <= 255 for number in numbers) and len(numbers) == 3:
                red, green, blue = map(int, numbers)
                remap.colors[red, green, blue] = value
            else:
                raise ValueError(f"must have values, colours 'R G B' or '{OTHER}' as keys, got {key!r}")
        return cls(remap.values, remap.colors, other)


def classes_by_value(convention: str, classes: int, remap: Remap) -> dict[int, int]:
    """Class, or 255, of every value that a label may hold; values without one are an error."""
    given: dict[int, int]
    if remap.values:
        given = {IGNORE_INDEX: IGNORE_INDEX, **remap.values}
    elif convention == "cityscapes":
        given = dict.fromkeys(range(_CITYSCAPES_LAST_ID + 1), IGNORE_INDEX)
        given |= {value: index for index, value in enumerate(_CITYSCAPES_IDS)}
    elif convention == "ade20k":
        given = {0: IGNORE_INDEX} | {index + 1: index for index in range(classes)}
    elif convention == "from_one":
        given = {0: IGNORE_INDEX, IGNORE_INDEX: IGNORE_INDEX} | {index + 1: index for index in range(classes)}
    elif convention == "cocostuff":
        values = (value for value in range(182) if value + 1 not in _COCOSTUFF_GONE)
        given = {value: index for index, value in enumerate(values)} | {IGNORE_INDEX: IGNORE_INDEX}
    else:
        given = {index: index for index in range(classes)} | {IGNORE_INDEX: IGNORE_INDEX}
        if convention == "camvid":
            given[classes] = IGNORE_INDEX
    return given


def classes_by_color(convention: str) -> dict[Color, int]:
    """Class, or 255, of the colours that a convention itself knows; none but CamVid's does."""
    if convention != "camvid":
        return {}
    known = {color: index for index, colors in enumerate(_CAMVID_COLORS) for color in colors}
    return known | {_CAMVID_VOID: IGNORE_INDEX}


def hint(convention: str, classes: int, remapped: bool, wrong: Collection[int]) -> str:
    """The likely remedy for values that the convention does not know."""
    if remapped:
        return "data.remap says nothing about it; 'other: 255' in it ignores all others"
    if convention == "ade20k" and set(wrong) == {IGNORE_INDEX}:
        return "ADE20K's files hold no 255; if they are shifted to 0..149 already: data.labels=index"
    if convention == "cityscapes" and set(wrong) == {IGNORE_INDEX}:
        return "*_labelIds.png hold no 255; if these are *_labelTrainIds.png: data.labels=index"
    if convention == "index" and classes == CLASSES["cityscapes"] and max(wrong) <= _CITYSCAPES_LAST_ID:
        return "if these are Cityscapes' *_labelIds.png: data.labels=cityscapes"
    if convention == "index" and set(wrong) == {classes} and classes == CLASSES["camvid"]:
        return (
            "if these are CamVid's, where 11 is unlabelled: data.labels=camvid; if the classes count from 1: from_one"
        )
    if convention == "index" and set(wrong) == {classes}:
        name = "ade20k" if classes == CLASSES["ade20k"] else "from_one"
        return f"if the classes count from 1 and 0 is none of them, as in ADE20K: data.labels={name}"
    return f'the meaning of values is told by data.labels ({", ".join(CONVENTIONS)}) or "data.remap={{VALUE: CLASS}}"'
