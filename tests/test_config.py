"""Configuration files: defaults, overrides, and messages that name key, value and remedy."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pspnet_fast.data.conventions import Remap
from pspnet_fast.models import PSPNet
from pspnet_fast.training import ConfigError, TrainConfig, load_config
from pspnet_fast.training.config import RULES, DataConfig, ModelConfig
from pspnet_fast.training.config_text import to_yaml

CONFIGS = Path(__file__).parent.parent / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 0.5, epochs: 3}\nmodel:\n  backbone: resnet18\n")
    config = load_config(path, ["train.lr=2e-2", "model.bins=[1, 4]", "data.crop=[32,48]", "train.bf16=true"])
    assert (config.train.lr, config.train.epochs, config.train.momentum) == (0.02, 3, 0.9)
    assert (config.model.backbone, config.model.bins, config.data.crop) == ("resnet18", [1, 4], [32, 48])
    assert config.train.bf16 is True
    assert load_config(path, ["model.bins=null"]).model.bins is None


def test_remap_in_file_and_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  remap:\n    0: 0\n    255: 1\n    12 0 200: 1\n    other: 255\n")
    assert load_config(path).data.remap == {0: 0, 255: 1, "12 0 200": 1, "other": 255}
    path = write(tmp_path, "{}")
    assert load_config(path).data.remap == {}
    assert load_config(path, ["data.remap={0: 0, 255: 1}"]).data.remap == {0: 0, 255: 1}
    assert Remap.parse(load_config(path, ["data.remap.7=0", "data.remap.8=1"]).data.remap).values == {7: 0, 8: 1}


TEXTS = [
    "2024_01",
    "010",
    "1e3",
    "1.50",
    "0x10",
    "1:30",
    "on",
    "true",
    "null",
    "???",
    "a: b",
    "{x}",
    "[a",
    "a #b",
    "a=b",
]
TEXTS += ["'q'", "${HOME}/x", "\\${x}", "\u00fc"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_written(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, "{}"), [f"data.root={text}"]).data.root == text
    if text not in ("null", "???", "a: b", "{x}", "[a", "a #b", "'q'"):  # which YAML wants quoted
        assert load_config(write(tmp_path, f"data:\n  root: {text}\n")).data.root == text


def test_values_are_typed_by_their_field(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {ohem: on, bf16: No, class_weights: [1, 2e0], lr: .5, power: 1.}")
    overrides = ["train.epochs=+5", "model.head_channels=~", "train.channels_last=1", "data.remap={07: 1, 8: 0}"]
    config = load_config(path, overrides)
    assert (config.train.ohem, config.train.bf16, config.train.channels_last) == (True, False, True)
    assert (config.train.class_weights, config.train.lr, config.train.power) == ([1.0, 2.0], 0.5, 1.0)
    assert isinstance(config.train.power, float)
    assert (config.train.epochs, config.model.head_channels) == (5, None)
    assert Remap.parse(config.data.remap).values == {7: 1, 8: 0}


def test_an_override_replaces_and_a_deeper_one_adds(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {remap: {7: 0, other: 255}}")
    assert load_config(path, ["data.remap={0: 0, 255: 1}"]).data.remap == {0: 0, 255: 1}
    assert load_config(path, ["data.remap.0=1"]).data.remap == {7: 0, "other": 255, 0: 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {root: stra\u00dfe}", encoding=encoding)
    if encoding == "utf-8-sig":
        assert load_config(path).data.root == "stra\u00dfe"
    else:
        with pytest.raises(ConfigError, match=r"run.yaml:1: is not UTF-8"):
            load_config(path)


def test_defaults_are_those_of_semseg(tmp_path: Path) -> None:
    train = load_config(write(tmp_path, "{}")).train
    assert (train.lr, train.head_lr_factor, train.power, train.momentum) == (0.01, 10, 0.9, 0.9)
    assert (train.weight_decay, train.aux_weight, train.batch_size) == (1e-4, 0.4, 16)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {epoch: 3}", [], "run.yaml: unknown key 'train.epoch'; the nearest valid key is 'train.epochs'"),
        ("trian: {lr: 1}", [], "run.yaml: unknown key 'trian.lr'; the nearest valid key is 'train.lr'"),
        ("lr: 1", [], "run.yaml: unknown key 'lr'; the nearest valid key is 'train.lr'"),
        ("{}", ["train.crop=3"], "unknown key 'train.crop'; the nearest valid key is 'data.crop'"),
        (
            "{}",
            ["train.optimizer=adam"],
            "unknown key 'train.optimizer'; train has the keys epochs, batch_size, .*log_every$",
        ),
        ("{}", ["trian.optimizer=adam"], r"unknown key 'trian.optimizer'; the nearest valid key is 'train\.\.\.\.'"),
        ("{}", ["solver.base=1"], r"unknown key 'solver.base'; the keys are model\.\*, data\.\*, train\.\*"),
        ("seed0: 1", [], r"unknown key 'seed0'; the keys are model\.\*, data\.\*, train\.\*"),
        ("{}", ["data.rot=x"], "command line: unknown key 'data.rot'; the nearest valid key is 'data.root'"),
        ("{}", ["train.lr"], "an override must be key=value, got 'train.lr'"),
        ("train: {lr: fast}", [], "run.yaml: train.lr must be float, got 'fast'"),
        ("{}", ["train.epochs=1.5"], "command line: train.epochs must be int, got '1.5'"),
        ("{}", ["train.bf16=maybe"], "command line: train.bf16 must be bool, got 'maybe'"),
        ("{}", ["data.crop=64"], r"command line: data.crop must be list\[int\], got '64'"),
        ("data: {crop: [a, 3]}", [], r"run.yaml: data.crop must be list\[int\], got \['a', '3'\]"),
        ("{}", ["model.head_channels=x"], r"command line: model.head_channels must be int \| None, got 'x'"),
        ("train: 3", [], "run.yaml: train must be a mapping, got '3'"),
        ("- 1", [], "run.yaml: must be a mapping"),
        ("train: {lr: [", [], "run.yaml: no valid YAML: line 1: "),
        ("train:\n  lr: 1\n  lr: 2", [], "run.yaml: no valid YAML: line 2: 'lr' is given twice"),
        ("{}", ["data.crop=[1, 2"], "data.crop: no valid YAML: line 1: "),
        ("data: {root: \0}", [], "run.yaml: is not UTF-8"),
        ("data: {root: null}", [], "run.yaml: data.root must be str, got None"),
        ("{}", ["data.root="], "data.root must be the name of a folder, got ''"),
        ("{}", ["data.root.x=1"], "command line: data.root must be str, got {'x': '1'}"),
        ("{}", [r"data.crop[0]=3"], r"unknown key 'data.crop\[0\]'; the nearest valid key is 'data.crop'"),
        ("{}", ["train.epochs=010"], "train.epochs must be int, got '010'; write 10$"),
        ("{}", ["train.epochs=1e3"], "train.epochs must be int, got '1e3'; write 1000$"),
        ("{}", ["train.epochs=1e999"], "train.epochs must be int, got '1e999'$"),
        ("{}", ["train.epochs=1:30"], "train.epochs must be int, got '1:30'$"),
        ("train: {epochs: 010}", ["train.epochs=3"], "run.yaml: train.epochs must be int, got '010'; write 10$"),
        ("train: {lr: 01.5}", [], "run.yaml: train.lr must be float, got '01.5'; write 1.5$"),
        ("{}", ["train.lr=1_0"], "train.lr must be float, got '1_0'; write 10$"),
        ("{}", ["train.lr=on"], "train.lr must be float, got 'on'$"),
        ("{}", ["data.crop=[010, 3]"], r"data.crop must be list\[int\], got \['010', '3'\]; write 10$"),
        ("{}", ["train.epochs=0"], "train.epochs must be at least 1, got 0"),
        ("{}", ["train.lr=0"], "train.lr must be above 0, got 0.0"),
        ("{}", ["train.momentum=1"], "train.momentum must be at least 0 and below 1, got 1.0"),
        ("{}", ["train.workers=-1"], "train.workers must be at least 0, got -1"),
        ("{}", ["train.label_smoothing=1.5"], "train.label_smoothing must be from 0 to 1, got 1.5"),
        ("{}", ["train.ohem_threshold=0"], "train.ohem_threshold must be above 0 and at most 1, got 0.0"),
        ("{}", ["train.ohem_min_kept=-1"], "train.ohem_min_kept must be at least 0, got -1"),
        (
            "{}",
            ["train.class_weights=[1,-1]"],
            r"train.class_weights must be at least 0 each and not all 0, got \[1.0, -1.0\]",
        ),
        ("{}", ["train.class_weights=[]"], r"train.class_weights must be at least 0 each and not all 0, got \[\]"),
        ("{}", ["train.class_weights=[0,0]"], r"train.class_weights must be at least 0 each and not all 0"),
        ("{}", ["train.class_weights=[1,.nan]"], r"train.class_weights must be finite, got \[1.0, nan\]"),
        ("{}", ["train.lr=.inf"], "train.lr must be finite, got inf"),
        ("{}", ["train.aux_weight=.nan"], "train.aux_weight must be finite, got nan"),
        ("{}", ["model.stem=deep"], "model.stem must be one of 'deep64', 'deep32', 'conv7', got 'deep'"),
        ("{}", ["model.head=x"], "model.head must be one of 'fused', 'concat', got 'x'"),
        ("{}", ["model.bins=[]"], r"model.bins must be one or more numbers of at least 1, got \[\]"),
        ("{}", ["model.head_channels=0"], "model.head_channels must be at least 1, got 0"),
        ("{}", ["data.crop=[64]"], r"data.crop must be \[height, width\], both at least 1, got \[64\]"),
        ("{}", ["data.val_crop=[0,3]"], r"data.val_crop must be \[height, width\]"),
        ("{}", ["data.std=[1,1]"], "data.std must be three numbers"),
        ("{}", ["data.std=[1,1,0]"], "data.std must be above 0"),
        ("{}", ["data.labels=ade"], "data.labels must be one of 'auto', 'index', 'from_one', .*, 'color', got 'ade'"),
        (
            "{}",
            ["data.remap=0:0", "data.remap=255:1"],
            r'data.remap must be a mapping, .* in quotes: "\{0: 0, 255: 1\}"',
        ),
        ("{}", ["data.remap={0:0,255:1}"], "data.remap must .*blank"),
        ("{}", ["data.remap={0: road}"], "data.remap must give a class or 255 for 0, got 'road'"),
        ("{}", ["data.scale=[2,1]"], "data.scale must be 0 < low <= high"),
        ("{}", ["data.degrees=[2,1]"], "data.degrees must be low <= high"),
    ],
)
def test_errors(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text), overrides)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")


def test_train_config_alone_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size must be at least 1, got 0"):
        TrainConfig(batch_size=0)


CHANGES = [
    "train.lr=1e-5",
    "model.bins=null",
    "train.class_weights=[1, .5]",
    "data.root=a folder: #1",
    "data.crop=[3,4]",
]


@pytest.mark.parametrize("overrides", [[], CHANGES], ids=["defaults", "changed"])
def test_printed_configuration_is_one(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(write(tmp_path, "{}"), overrides)
    text = to_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert config.data.root == ("a folder: #1" if overrides else "data")
    assert "`" not in text


def test_printed_configuration_has_meanings_and_allowed_values(tmp_path: Path) -> None:
    lines = to_yaml(load_config(write(tmp_path, "{}"))).splitlines()
    settings = [index for index, line in enumerate(lines) if line.startswith("  ") and "#" not in line]
    assert len(settings) == sum(len(fields(kind)) for kind in (ModelConfig, DataConfig, TrainConfig))
    for index in settings:
        assert re.fullmatch(r"  # \S.+ \(.+\)", lines[index - 1]), lines[index]
    assert lines[lines.index("  stem: deep64") - 1].endswith("(str, one of 'deep64', 'deep32', 'conv7')")
    assert lines[lines.index("  lr: 0.01") - 1].endswith("(float, above 0)")
    assert lines[lines.index("  head_channels: null") - 1].endswith("(int | null, at least 1)")


def test_every_rule_is_of_a_setting_and_holds_for_its_default() -> None:
    defaults = {"model": ModelConfig(), "data": DataConfig(), "train": TrainConfig()}
    for key, rule in RULES.items():
        section, _, name = key.partition(".")
        value = getattr(defaults[section], name)
        assert value is None or rule.holds(value)


def test_shipped_configurations_build_their_model() -> None:
    import dataclasses

    import torch

    models = [dataclasses.asdict(load_config(path).model) for path in sorted(CONFIGS.glob("*.yaml"))]
    for number, model in enumerate(models):
        if model not in models[:number]:
            with torch.device("meta"):
                PSPNet(2, **model)
