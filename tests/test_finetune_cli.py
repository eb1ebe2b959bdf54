"""The command's options: what they become, what a file of them may hold, what is refused."""

import dataclasses

import pytest
import tyro

from gptoss_jax.cli import finetune
from gptoss_jax.cli.main import main
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import LoraConfig
from gptoss_jax.train import Settings
from gptoss_jax.train.settings import OptimizerSettings


def parsed(*words):
    return tyro.cli(finetune.Arguments, args=finetune.expand(list(words)))


def test_without_options_the_settings_are_those_of_the_library():
    assert finetune.settings(parsed()) == Settings()
    full = finetune.settings(parsed("--full"))
    assert full == dataclasses.replace(
        Settings(), lora=None, optimizer=OptimizerSettings(learning_rate=2e-5)
    )


def test_options_reach_the_settings():
    found = finetune.settings(
        parsed(
            *("--rank", "4", "--targets", "q, down", "--layers", "0,2-3", "--expert-rank", "2"),
            *("--learning-rate", "1e-3", "--schedule", "linear", "--b2", "0.9", "--seed", "7"),
            *("--analysis-weight", "0.5", "--effort", "low", "--date", "2026-01-02"),
            *("--no-packing", "--log", "tensorboard,wandb", "--result", "best", "--clip", "0"),
        )
    )
    assert found.lora == LoraConfig(4, 8.0, ("q", "down"), (0, 2, 3), 2)
    assert (found.optimizer.learning_rate, found.optimizer.schedule) == (1e-3, "linear")
    assert (found.optimizer.b2, found.optimizer.clip, found.seed) == (0.9, 0.0, 7)
    assert (found.data.analysis_weight, found.data.reasoning_effort) == (0.5, "low")
    assert found.data.date == "2026-01-02"
    assert (found.packing, found.log, found.result) == (False, ("tensorboard", "wandb"), "best")


def test_a_file_of_options_stands_before_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-3\nrank: 4\ntargets: [q, v]\nremat: false\nplot: null\nmodel: here\n"
    )
    found = parsed("--config", str(file), "--rank", "6")
    assert found.model.model == "here"
    settings = finetune.settings(found)
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.lora == LoraConfig(6, 12.0, ("q", "v"))
    assert not settings.remat


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1e-3", "no option 'learning_rte': did you mean learning_rate?"),
        ("- rank", "expected options as name: value"),
        ("rank: [", "is no YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(GptOssError, match=message.replace("?", r"\?")):
        finetune.expand([f"--config={file}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data is required"),
        (["--data", "x"], "--output is required"),
        (["--data", "x", "--output", "y", "--freeze", "sinks"], "--freeze and --unpack are for"),
        (["--data", "x", "--output", "y", "--patience", "2"], "need held-out data"),
        (["--data", "x", "--output", "y", "--eval-data", "z", "--eval-share", "0.1"], "give one"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(capsys, words, message):
    assert main(["finetune", *words]) == 2
    assert message in capsys.readouterr().err


def test_mistakes_are_one_line(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a b c"}\n{"text": \n')
    words = ["finetune", "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert f"{data}:2: not JSON" in err
    assert err.count("\n") == 1
    assert main([*words, "--layers", "1-x"]) == 1
    assert "layers '1-x': expected numbers and ranges" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_preview_loads_no_weights_and_shows_what_is_learnt(capsys, tmp_path, monkeypatch):
    from gptoss_jax import checkpoint

    monkeypatch.setattr(checkpoint, "load_params", None)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is 2 + 3?", "completion": "The sum is 5."}\n')
    assert main(["finetune", "--data", str(data), "--length", "256", "--preview"]) == 0
    out = capsys.readouterr().out
    assert "[[<|channel|>final<|message|>The sum is 5.<|return|>]]" in out
    assert "172,032 trainable parameters; memory: weights" in out
