"""A YAML file and flags mean the same, flags win, and what is misspelt is refused with what was meant."""

import logging
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from training.arguments import ROOMS, parse_arguments
from training.corpus_arguments import CorpusArguments
from training.personal import PersonalTrainingArguments
from training.trainer import RecipeTrainingArguments


@dataclass
class Settings:
    """One field of each type that the recipes use."""

    learning_rate: float = field(default=0.1, metadata={"help": "A number."})
    rank: int = field(default=8, metadata={"help": "A whole number."})
    use_cache: bool = field(default=False, metadata={"help": "A switch."})
    keep_all: bool = field(default=True, metadata={"help": "A switch that is on."})
    speakers: list[str] | None = field(default=None, metadata={"help": "Several."})
    max_seconds: float | None = field(default=None, metadata={"help": "A number or none."})
    kind: str = field(default="mlp", metadata={"help": "A choice.", "choices": ["mlp", "bottleneck"]})


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "recipe.yaml")

    return write


def parse(*argv: str) -> Settings:
    (settings,) = parse_arguments(Settings, argv=argv)
    return settings


def test_defaults_hold_without_file_and_flags():
    assert parse() == Settings()


def test_a_file_gives_every_type(config):
    text = """
        learning_rate: 1e-4
        rank: 4
        use_cache: true
        keep_all: false
        speakers: [ann, ben]
        max_seconds: 30
        kind: bottleneck
    """
    assert parse("--config", config(text)) == Settings(1e-4, 4, True, False, ["ann", "ben"], 30.0, "bottleneck")


def test_a_number_without_a_point_is_still_a_number(config):
    assert parse("--config", config("learning_rate: 1e-4")).learning_rate == 0.0001  # a string in YAML 1.1


@pytest.mark.parametrize("flag", ["--config={}", "--config {}"])
def test_a_flag_overrules_the_file_wherever_it_stands(config, flag):
    tokens = flag.format(config("rank: 4\nkind: bottleneck")).split()
    assert parse(*tokens, "--rank", "2") == parse("--rank=2", *tokens) == Settings(rank=2, kind="bottleneck")


def test_a_list_on_the_command_line_replaces_the_file_s(config):
    assert parse("--config", config("speakers: [ann, ben]"), "--speakers", "cy").speakers == ["cy"]


def test_an_empty_value_keeps_the_default(config):
    assert parse("--config", config("max_seconds:\nrank: 4")) == Settings(rank=4)


def test_an_empty_file_changes_nothing(config):
    assert parse("--config", config("# nothing yet\n")) == Settings()


def test_a_bare_switch_turns_on():
    assert parse("--use_cache").use_cache is True
    assert parse("--no_keep_all").keep_all is False


def test_negative_numbers_are_values(config):
    assert parse("--config", config("learning_rate: -1e-4")) == parse("--learning_rate=-1e-4") == Settings(-0.0001)


def test_a_mapping_reaches_the_training_arguments(config, tmp_path):
    kwargs = "{num_cycles: 2, share: 1e-4, mode: min, on: true, steps: [1, x], quoted: 'null', bare: null}"
    path = config(f"output_dir: {tmp_path}\nlr_scheduler_kwargs: {kwargs}\nuse_cpu: true")
    (arguments,) = parse_arguments(RecipeTrainingArguments, argv=["--config", path])
    expected = {
        "num_cycles": 2,
        "share": 1e-4,
        "mode": "min",
        "on": True,
        "steps": [1, "x"],
        "quoted": "null",
        "bare": None,
    }
    assert arguments.lr_scheduler_kwargs == expected


NAMES = ["010", "12:30", "1.10", "no", "Yes", "0x1F", "1_000", "1e3", "2024-01-01", "~a", "007.50", "null-1"]


@pytest.mark.parametrize("form", ["speakers: [{}]", "speakers:\n- {}\n", "speakers: {}"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_as_it_is_written(config, form, name):
    assert parse("--config", config(form.format(name))).speakers == [name]


def test_a_quoted_null_is_a_name(config):
    assert parse("--config", config("speakers: 'null'")).speakers == ["null"]
    assert parse("--config", config("speakers: null")).speakers is None


def test_a_key_that_stands_twice_is_refused(config):
    path = config("rank: 4\nrank: 5")
    with pytest.raises(ValueError, match="`rank` must stand in .*recipe.yaml once, got it twice"):
        parse("--config", path)


@pytest.mark.parametrize("name", ["-take.wav", "--take.wav", "--rank", "a=b.wav", "-1.wav", "--"])
def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    (file,) = parse("--rank", "2", "--speakers", "--", name).speakers
    assert Path(file).resolve() == tmp_path / name
    assert parse("--rank=3").rank == 3


def test_a_file_that_looks_like_no_flag_of_the_recipe_needs_no_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-take.wav").touch()
    assert parse("--speakers", "ann", "-take.wav", "--rank", "2") == Settings(rank=2, speakers=["ann", "./-take.wav"])
    with pytest.raises(ValueError, match="`--take.wav` is not a flag of this recipe"):
        parse("--speakers", "--take.wav")


def test_several_dataclasses_come_back_in_order():
    settings, corpus = parse_arguments(
        Settings, CorpusArguments, argv=["--dataset", "synthetic", "--concatenate_max", "4", "--rank", "1"]
    )
    assert (settings.rank, corpus.dataset, corpus.concatenate) == (1, "synthetic", (1, 4))


def test_an_unknown_key_is_refused_with_file_and_suggestion(config):
    path = config("learning_rat: 0.1")
    with pytest.raises(
        ValueError, match=r"`learning_rat` in .*recipe.yaml is not a flag .* Did you mean `learning_rate`"
    ):
        parse("--config", path)


@pytest.mark.parametrize("token", ["--rnak=2", "--rnak"])
def test_an_unknown_flag_is_refused_with_a_suggestion(token):
    with pytest.raises(ValueError, match=r"`--rnak` is not a flag of this recipe. Did you mean `rank`\?"):
        parse(token, "2")


def test_an_unknown_flag_like_no_other_points_to_the_help():
    with pytest.raises(ValueError, match="`--zzz` is not a flag of this recipe. `--help` lists the flags."):
        parse("--zzz", "2")


def test_abbreviated_flags_are_refused():
    with pytest.raises(ValueError, match="`--learning` is not a flag"):
        parse("--learning", "0.1")


def test_a_value_without_a_flag_is_refused():
    with pytest.raises(ValueError, match=r"Every value must follow a flag, got \['stray'\]"):
        parse("stray")


@pytest.mark.parametrize(
    "text", ["rank: 2.5", "rank: many", "use_cache: perhaps", "kind: lora", "learning_rate: fast"]
)
def test_a_value_of_another_type_ends_with_the_flag_s_name(config, text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--config", config(text))
    assert stop.value.code == 2
    assert f"argument --{text.partition(':')[0]}" in capsys.readouterr().err


def test_a_config_without_a_file_ends_with_the_flag_s_name(capsys):
    with pytest.raises(SystemExit):
        parse("--rank", "2", "--config")
    assert "argument --config: expected one argument" in capsys.readouterr().err


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"`config` must be a YAML file, got nowhere.yaml, which does not exist"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- rank", "list"), ("rank", "single value"), ("3", "single value")])
def test_a_file_that_is_no_mapping_is_refused_by_its_type(config, text, kind):
    path = config(text)
    with pytest.raises(ValueError, match=f"`config` must map flags to values, got a {kind} in .*recipe.yaml"):
        parse("--config", path)


def test_a_file_that_does_not_parse_is_named(config):
    path = config("rank: [1")
    with pytest.raises(ValueError, match="must be a YAML file, got .*recipe.yaml, which does not parse"):
        parse("--config", path)


def test_help_prints_what_each_flag_means(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "A whole number." in capsys.readouterr().out


@pytest.fixture
def show_help(capsys):
    """Returns what a recipe of one person's settings prints for a flag that asks for help."""

    def show(flag: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse_arguments(CorpusArguments, PersonalTrainingArguments, argv=[flag])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return show


def list_flags(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?(--\w+)", text, flags=re.MULTILINE)


def test_help_shows_the_recipe_s_flags_and_what_most_runs_need_of_the_trainer_s(show_help):
    flags = list_flags(show_help("--help"))
    assert flags[1:4] == ["--dataset", "--dataset_config", "--text_column"]
    # Declared by a class of ours, essential, and neither.
    assert {"--early_stopping_patience", "--tri_stage", "--output_dir", "--seed", "--config", "--help_all"} < {*flags}
    assert not {"--adafactor", "--torch_compile", "--fsdp", "--deepspeed", "--optim"} & {*flags}
    assert len(flags) < 60


def test_help_all_shows_every_flag_once_and_the_trainer_s_last(show_help):
    flags, shown = list_flags(show_help("--help_all")), list_flags(show_help("--help"))
    known = {f"--{field.name}" for part in (CorpusArguments, PersonalTrainingArguments) for field in fields(part)}
    assert flags[: len(shown)] == shown
    assert known <= {*flags}
    assert len(flags) == len({*flags}) > len(shown)


def test_help_of_a_recipe_without_training_has_nothing_behind_it(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--help_all" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--help_all` is not a flag of this recipe"):
        parse("--help_all")


def test_a_flag_that_is_not_shown_still_counts(tmp_path):
    (arguments,) = parse_arguments(
        PersonalTrainingArguments, argv=["--output_dir", str(tmp_path), "--use_cpu", "--weight_decay", "0.5"]
    )
    assert arguments.weight_decay == 0.5


@pytest.mark.parametrize(("level", "is_shown"), [("passive", True), ("warning", True), ("error", False)])
def test_log_level_holds_for_this_project_s_notes_too(tmp_path, monkeypatch, caplog, level, is_shown):
    for room in ROOMS:  # back to what they are when the test ends
        monkeypatch.setattr(logging.getLogger(room), "level", logging.NOTSET)
    parse_arguments(PersonalTrainingArguments, argv=["--output_dir", str(tmp_path), "--use_cpu", "--log_level", level])
    logging.getLogger("data.utterances").warning("a note")
    assert ("Runs as 1 process on cpu" in caplog.text) == ("a note" in caplog.text) == is_shown
