"""Settings from the resumed run, the config file and the command line."""

from __future__ import annotations

import json

import pytest

from lasgd.cli.config import combine, read_config, read_stored, validated
from lasgd.errors import ConfigurationError
from lasgd.training.settings import Settings, SimulationSettings


def config_file(tmp_path, text: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_config_file():
    settings = combine({"lr": 0.3}, {"lr": 0.2, "seed": 7})
    assert (settings.lr, settings.seed) == (0.3, 7)


@pytest.mark.parametrize("given", [{"samples": 1000}, {"epochs": 2.0}])
def test_a_budget_on_the_command_line_takes_the_place_of_the_config_files(given):
    for config in ({"samples": 5}, {"epochs": 5.0}):
        settings = combine(given, config)
        assert {"samples": settings.samples, "epochs": settings.epochs} == {"samples": None, "epochs": None} | given


def test_both_budgets_from_one_source_are_refused():
    with pytest.raises(ConfigurationError, match="give one of --samples, --epochs and --seconds"):
        combine({}, {"samples": 5, "epochs": 1.0})


def test_config_keys_are_spelt_like_options_or_like_fields(tmp_path):
    path = config_file(tmp_path, 'batch-size = 64\nweight_decay = 0.1\ncondition = "step=10ms"\n')
    assert read_config(path) == {"batch_size": 64, "weight_decay": 0.1, "condition": "step=10ms"}


def test_an_unknown_config_key_is_named_with_the_nearest(tmp_path):
    path = config_file(tmp_path, "batchsize = 64\n")
    with pytest.raises(ConfigurationError, match=r"run\.toml: config key 'batchsize' .* Did you mean 'batch-size'"):
        read_config(path)


def test_a_config_key_given_in_both_spellings_is_refused(tmp_path):
    path = config_file(tmp_path, "batch-size = 64\nbatch_size = 32\n")
    with pytest.raises(ConfigurationError, match=r"run\.toml: config key 'batch-size' is given twice"):
        read_config(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr = true", "--lr: must be a valid number, got True"),
        ('batch-size = "32"', "--batch-size: must be a valid integer, got 32"),
        ("batch-size = 32.0", "--batch-size: must be a valid integer, got 32.0"),
        ("fragments = true", "--fragments: must be 'auto' or a valid integer, got True"),
        ("data = 3", "--data: must be a valid string, got 3"),
    ],
)
def test_a_config_value_of_another_type_is_refused(tmp_path, line, said):
    with pytest.raises(ConfigurationError) as caught:
        combine({}, read_config(config_file(tmp_path, line)))
    assert str(caught.value) == said


def test_whole_numbers_are_numbers_too_and_fragments_either(tmp_path):
    for text, value in (("5", 5), ('"auto"', "auto")):
        settings = combine({}, read_config(config_file(tmp_path, f"lr = 1\nepochs = 2\nfragments = {text}\n")))
        assert (settings.lr, settings.epochs, settings.fragments) == (1.0, 2.0, value)


@pytest.mark.parametrize("name", ["timeout_s", "start_timeout_s"])
@pytest.mark.parametrize(("value", "said"), [(1e-9, "greater than or equal to 0.001"), (1e15, "less than or equal to")])
def test_a_time_out_that_no_clock_can_keep_is_refused(name, value, said):
    with pytest.raises(ConfigurationError, match=f"must be {said}"):
        validated({name: value})
    for possible in (0.001, 30 * 86400):
        assert getattr(validated({name: possible}), name) == possible


def test_more_than_a_million_steps_per_round_are_refused():
    with pytest.raises(ConfigurationError, match=r"--steps-per-round: must be less than or equal to 1000000"):
        validated({"steps_per_round": 1e7})


def test_a_config_file_that_is_no_toml_is_named_with_the_line(tmp_path):
    with pytest.raises(ConfigurationError, match=r"run\.toml is not a TOML file: .*line 2"):
        read_config(config_file(tmp_path, "lr = 0.1\nseed: 3\n"))
    with pytest.raises(ConfigurationError, match=r"nothing\.toml cannot be read: No such file"):
        read_config(tmp_path / "nothing.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


def test_each_problem_is_one_line_with_its_option():
    with pytest.raises(ConfigurationError) as caught:
        validated({"lr": -0.1, "batch_size": "many", "norm": "none", "fragments": "some"})
    assert str(caught.value).splitlines() == [
        "--norm: must be 'group' or 'batch', got none",
        "--fragments: must be 'auto' or a valid integer, got some",
        "--batch-size: must be a valid integer, got many",
        "--lr: must be greater than 0, got -0.1",
    ]


def stored_run(tmp_path, settings: Settings):
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    return tmp_path


def test_a_resumed_run_keeps_its_settings(tmp_path):
    settings = Settings(lr=0.3, epochs=2, ranks=4, fragments=3)
    stored = read_stored(stored_run(tmp_path, settings))
    assert combine({}, {}, stored) == settings
    assert combine({"lr": 0.3, "epochs": 2.0}, {}, stored) == settings


def test_another_value_for_a_resumed_run_is_refused_with_both(tmp_path):
    stored = read_stored(stored_run(tmp_path, Settings(lr=0.3)))
    with pytest.raises(ConfigurationError, match=r"--lr: 0\.2 differs from the resumed run's 0\.3"):
        combine({"lr": 0.2}, {}, stored)
    with pytest.raises(ConfigurationError, match="--seed: 5 differs from the resumed run's 0"):
        combine({}, {"seed": 5}, stored)


def test_what_is_a_ranks_own_business_may_change_when_resuming(tmp_path):
    stored = read_stored(stored_run(tmp_path, Settings(lr=0.3, workers=1)))
    settings = combine({"workers": 3, "timeout_s": 9.0}, {}, stored)
    assert (settings.workers, settings.timeout_s, settings.lr) == (3, 9.0, 0.3)


def test_resuming_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--resume: .*missing is not a folder"):
        read_stored(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"--resume: .* is not a run folder"):
        read_stored(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"learning_rate": 1}))
    with pytest.raises(ConfigurationError, match=r"--resume: .*settings\.json: setting 'learning_rate' is not known"):
        read_stored(tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="does not hold settings"):
        read_stored(tmp_path)


def test_resuming_a_simulated_run_says_that_it_was_one(tmp_path):
    stored = SimulationSettings(network="20mbit").model_dump(mode="json")
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigurationError, match=r"--resume: the run in .* was simulated"):
        read_stored(tmp_path)
