"""Presets of one's own: what is wrong in a file is one line that says where, and a name that is taken is no matter."""

from __future__ import annotations

import pytest

import inventories
from checkpoints import LAYERS, run, save, transformer
from lrq.config import Conversion
from lrq.errors import InputError
from lrq.models.preset import find_preset, presets
from lrq.selection.decide import decide
from lrq.selection.policies import check_words, choose_policies, load_preset

RULE = '[[rules]]\nwhy = "y"\npatterns = ["a"]\n'
KEEP = '[[keep]]\nwhy = "y"\npatterns = ["a"]\n'
KEYS = '[[identify]]\nkeys = ["a"]\n'
WRONG = {
    "about = 1": "about must be a str, is 1",
    KEEP: "about is missing",
    'about = "x"\nkepe = []': "no such key kepe; did you mean keep",
    'about = "x"\nkeep = [1]': "keep 1: must be a table",
    "about": "not a TOML file",
    'about = "x"\nflags = [1]': "flags must be a list of names, is [1]",
    'about = "x"\nactivation = "silo"': "activation: no such function 'silo'; did you mean silu?",
} | {
    f'about = "x"\n{text}': words
    for text, words in {
        '[[keep]]\nwhy = "y"': "keep 1: patterns is missing",
        '[[keep]]\nwhy = "y"\npatterns = []': "keep 1: patterns must be a list of names, one at least, is []",
        f"{KEEP}{KEEP}formats = [1]": "keep 2: formats must be a list of names, is [1]",
        f'{KEEP}formats = ["fp9"]': "keep 1: formats: no such format 'fp9'; did you mean fp8?",
        f'{KEEP}when = ["nvfp4"]': "keep 1: no such key when",
        RULE: "rules 1: format is missing",
        f'{RULE}format = "fp8"': "rules 1: when is missing",
        f'{RULE}when = ["nvfp4"]\nformat = "fp9"': "rules 1: format: no such format 'fp9'; did you mean fp8?",
        f'{RULE}format = "fp8"\nwhen = ["nvfp5"]': "rules 1: when: no such format 'nvfp5'; did you mean nvfp4?",
        f'{RULE}format = "fp8"\nwhen = [1]': "rules 1: when must be a list of names, one at least, is [1]",
        f'{RULE}format = "fp8"\nwhen = []': "rules 1: when must be a list of names, one at least, is []",
        "[[identify]]\nkeys = [1]": "identify 1: keys must be a list of names, one at least, is [1]",
        "[[identify]]\nkeys = []": "identify 1: keys must be a list of names, one at least, is []",
        '[[identify]]\nkeys = ["*.a"]': "identify 1: the first of keys must be a name",
        f"{KEYS}absent = [1]": "identify 1: absent must be a list of names, is [1]",
        f"{KEYS}shapes = {{ a = 5 }}": "identify 1: shapes must be a table of lists of integers",
        f"{KEYS}shapes = {{ a = [true] }}": "identify 1: shapes must be a table of lists of integers",
        f"{KEYS}unlike = [1]": "identify 1: unlike must be a list of tables of lists of integers, is [1]",
        f'{KEYS}unlike = [{{ a = ["b"] }}]': "identify 1: unlike must be a list of tables of lists of integers",
    }.items()
}


@pytest.mark.parametrize("text", WRONG)
def test_a_bad_preset_file_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_preset(str(path))
    assert str(error.value).startswith(f"--preset {path}: ") and WRONG[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_says_the_same(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f'about = "x"\n{RULE}when = ["nvfp4"]\nformat = "fp9"')
    result = run("plan", save(tmp_path / "in.safetensors", transformer()), "--preset", path)
    assert result.exit_code == 2
    assert result.stderr == f"error: --preset {path}: rules 1: format: no such format 'fp9'; did you mean fp8?\n"


def test_a_table_is_checked_as_a_file_is():
    table = {"name": "own", "about": "x", "rules": [{"why": "y", "patterns": ["a"], "format": "fp8", "when": ["fp9"]}]}
    with pytest.raises(InputError, match=r"preset own: rules 1: when: no such format 'fp9'"):
        choose_policies([], {}, (table,), "in")


@pytest.mark.parametrize("name", presets())
def test_the_packages_own_say_nothing_wrong(name):
    check_words(find_preset(name), name)


def test_a_file_named_as_a_preset_acts_beside_it(tmp_path):
    path = tmp_path / "flux1.toml"
    path.write_text('about = "mine"\n[[keep]]\nwhy = "as I like it"\npatterns = ["single_blocks.0.linear1"]\n')
    own = load_preset(str(path))
    found = inventories.entries(inventories.tensors("flux1_dev"))
    for asked in ([own, "flux1"], ["flux1", own]):
        kept = decide(found, Conversion.from_settings({"nvfp4": True, "preset": asked}), "in").kept
        assert kept["single_blocks.0.linear1.weight"] == "as I like it"
        assert kept["img_in.weight"] == "input or conditioning"
    alone = decide(found, Conversion.from_settings({"preset": [own]}), "in")
    assert alone.kept["single_blocks.0.linear1.weight"] == "as I like it" and "img_in.weight" not in alone.kept


def test_two_files_of_one_name_both_act(tmp_path):
    paths = [tmp_path / folder / "own.toml" for folder in ("a", "b")]
    for path, layer in zip(paths, LAYERS, strict=False):
        path.parent.mkdir()
        path.write_text(f'about = "mine"\n[[keep]]\nwhy = "w"\npatterns = ["{layer}"]\n')
    flags = [word for path in paths for word in ("--preset", path)]
    result = run("plan", save(tmp_path / "in.safetensors", transformer()), "--json", *flags)
    assert result.stdout.count('"_why": "w"') == 2


def test_a_preset_that_is_at_home_in_one_model_leaves_the_others_alone():
    """proj_out is a pattern of SDXL's, and a layer of its VAE."""
    unet = {f"model.diffusion_model.{key}": value for key, value in inventories.tensors("sdxl_unet").items()}
    vae = {f"first_stage_model.{side}.conv_in.weight": ("F16", (8, 8, 3, 3)) for side in ("encoder", "decoder")}
    vae |= {f"first_stage_model.decoder.mid.attn_1.{part}.weight": ("F16", (64, 64)) for part in ("q", "proj_out")}
    decisions = decide(inventories.entries(unet | vae), Conversion.from_settings({"preset": ["sdxl"]}), "in")
    assert decisions.policies["first_stage_model."].about == "VAE"
    assert not [layer.name for layer in decisions.layers if layer.name.startswith("first_stage_model")]
