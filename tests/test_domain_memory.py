"""The benchmark of memory builds the true shape, compares like with like, and counts tokens as a hand does."""

import json
import sys

import pytest
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from benchmarks.domain_memory import (
    CONFIGS,
    DISTILL,
    DTYPES,
    OURS,
    ROWS,
    STOCK,
    main,
    make_batch,
    make_model,
    make_objective,
    make_step,
    measure,
    summarize,
    take_from_cache,
    watch_steps,
)
from training.domain_methods import METHODS

CPU = torch.device("cpu")
TINY = ["--config", "tiny", "--device", "cpu", "--batch_size", "2", "--seconds", "2", "--num_steps", "1"]
STOCK_MODEL = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def config() -> Qwen2AudioConfig:
    """The tiny shape."""
    return Qwen2AudioConfig(**CONFIGS["tiny"])


def make(row: str, config: Qwen2AudioConfig, dtype: str = "bfloat16"):
    """Returns the objective of a row, without dropout, and a batch for it; weights are the same in every row."""
    torch.manual_seed(0)
    objective = make_objective(row, config, dtype, CPU).eval()
    model = make_model(config, "bfloat16", torch.device("meta"), tower_only=True)
    torch.manual_seed(1)
    batch = make_batch(model, batch_size=2, seconds=2, device=CPU, is_distilled=row in DISTILL)
    return objective, batch


def test_rows_have_every_method_of_the_recipe():
    assert {flags["method"] for flags in OURS.values()} == set(METHODS) - {"none"}


def test_true_shape_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration._from_config(Qwen2AudioConfig(**CONFIGS["qwen2_audio_7b"]))
    layer = 4 * 4096 * 4096 + 3 * 4096 + 3 * 4096 * 11_008 + 2 * 4096  # attention, its biases, three maps, two norms
    text = 32 * layer + 2 * 156_032 * 4096 + 4096
    projector, tower = 1280 * 4096 + 4096, model.model.audio_tower

    assert model.num_parameters() == text + projector + tower.num_parameters() == 8_397_094_912
    assert tower.num_parameters() == 636_968_960


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_made_part_by_part_is_as_the_constructor_makes_it(config, dtype):
    made = make_model(config, dtype, CPU, tower_only=False)
    constructed = Qwen2AudioForConditionalGeneration(config)

    assert not any(tensor.is_meta for tensor in made.state_dict(keep_vars=True).values())
    for name, buffer in constructed.named_buffers():  # turns of the positions, of which no weight file knows
        assert torch.equal(made.get_buffer(name), buffer)
    assert torch.equal(made.model.language_model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    embedding = made.model.language_model.embed_tokens.weight
    assert embedding.dtype == torch.bfloat16
    assert embedding.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_4bit_model_has_quantised_maps_with_the_scale_of_random_weights(config):
    model = make_model(config, "4bit", CPU, tower_only=False)
    linear = model.model.language_model.layers[0].mlp.up_proj
    unit = linear(torch.eye(64, dtype=torch.bfloat16))  # (in, out): the map itself

    assert linear.weight.numel() == 64 * 64 // 2  # two values a byte
    assert (linear.weight.quant_state.quant_type, linear.weight.quant_state.nested) == ("nf4", True)
    assert unit.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_distillation_has_the_tower_alone_in_memory(config):
    objective, _ = make("distill_bottleneck", config)
    model = objective.adapted_model
    held = {name for name, value in model.named_parameters() if not value.is_meta}
    tower = {f"model.audio_tower.{name}" for name, _ in model.model.audio_tower.named_parameters()}
    adapter = {name for name, value in model.named_parameters() if value.requires_grad}

    assert held == tower | adapter
    assert adapter.isdisjoint(tower)


@STOCK_MODEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stock", STOCK)
def test_stock_peft_and_ours_start_at_one_loss_and_train_as_much(config, stock, dtype):
    losses, sizes = [], []
    for row in (stock, stock.removeprefix("stock_")):
        objective, batch = make(row, config, dtype)
        losses.append(objective(**batch)["loss"].item())
        sizes.append(sum(value.numel() for value in objective.parameters() if value.requires_grad))

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), rel=0.02)  # nothing is known of 64 tokens
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("row", ["lora_llm", "domain_adapter_lightweight", "distill_bottleneck"])
def test_cached_batch_has_the_loss_of_its_audio(config, row):
    objective, batch = make(row, config)
    cached = take_from_cache(objective, batch)

    assert cached["states"].shape == (2, 50, 64)
    assert not {"input_features", "source_features"} & cached.keys()
    with torch.no_grad():
        audio_loss, cached_loss = (objective(**inputs)["loss"].item() for inputs in (batch, cached))
    assert cached_loss == pytest.approx(audio_loss, rel=2e-3)


@pytest.mark.parametrize("row", ["bottleneck", "projector", "lora_projector", "lora_llm"])
def test_steps_on_4_bits_have_gradients_for_all_that_trains_and_leave_the_base(config, row):
    objective, batch = make(row, config, "4bit")
    frozen = {name: value for name, value in objective.named_parameters() if not value.requires_grad}
    before = {name: value.detach().clone() for name, value in frozen.items()}
    step = make_step(objective, batch)
    for _ in range(2):  # at first a last layer of zeros keeps gradients from those before it
        step()

    assert all(value.grad.any() for value in objective.parameters() if value.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())


@STOCK_MODEL
def test_measured_rows_count_tokens_and_parameters():
    flags = {"device": "cpu", "batch_size": 2, "seconds": 2, "num_steps": 1}
    whole, stock, tower = (
        measure(row, "tiny", "bfloat16", **flags) for row in ("bottleneck", "stock_lora_llm", "distill_bottleneck")
    )

    assert whole["tokens"] == stock["tokens"] == 2 * (24 + 50 + 32)  # 2 s are 200 features, 50 placeholders
    assert tower["tokens"] == 2 * 50
    assert whole["trainable_parameters"] == tower["trainable_parameters"] == (64 + 1) * 256 + (256 + 1) * 64 + 2 * 64
    assert stock["trainable_parameters"] == 2 * 8 * (64 + 64)  # rank 8 on queries and values
    assert {"cached_seconds", "cached_peak_bytes"} <= whole.keys() - stock.keys()


def test_table_divides_tokens_by_seconds_and_names_the_limit():
    row = {
        "row": "distill_bottleneck", "dtype": "bfloat16", "device": "CPU", "batch_size": 4, "clip_seconds": 10.0,
        "tokens": 1000, "trainable_parameters": 33_216, "seconds": 0.5, "peak_bytes": 2.5e9, "cached_seconds": 0.25,
        "cached_peak_bytes": 1.5e9,
    }  # fmt: skip
    table = summarize([row])
    cells = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]

    limit = "2.50 GB (limit 4.00 GB)"
    assert cells == ["distill_bottleneck", "bfloat16", "33,216", limit, "2,000", "1.50 GB", "4,000"]
    assert "CPU; 4 clips of 10 s a step" in table
    stock = {key: value for key, value in row.items() if "cached" not in key} | {"row": "stock_lora_llm"}
    cells = [cell.strip() for cell in summarize([stock]).splitlines()[2].strip("|").split("|")]
    assert cells[3:] == ["2.50 GB", "2,000", "", ""]


def test_watched_steps_report_the_memory_that_they_hold():
    def hold(num_bytes: int) -> torch.Tensor:
        return torch.ones(num_bytes, dtype=torch.uint8)[0].float()

    little, much = (watch_steps(lambda size=size: hold(size), 2, CPU)["peak_bytes"] for size in (1, 64 * 2**20))
    assert much - little >= 50 * 2**20


def test_steps_without_a_finite_loss_are_no_measurement():
    with pytest.raises(RuntimeError, match="loss must stay finite, got nan"):
        watch_steps(lambda: torch.tensor(float("nan")), 1, CPU)


def test_clips_must_fit_into_the_tower(config):
    model = make_model(config, "bfloat16", torch.device("meta"), tower_only=True)
    with pytest.raises(ValueError, match="`seconds` must be from 1 to 10, got 10.5"):
        make_batch(model, batch_size=1, seconds=10.5, device=CPU, is_distilled=True)
    batch = make_batch(model, batch_size=1, seconds=10, device=CPU, is_distilled=True)
    assert batch["num_frames"].tolist() == [250]


def test_gpu_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device` must be one that torch sees, got cuda. Use `--config tiny"):
        main([])


def test_4_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="`dtypes` must be bfloat16 without bitsandbytes"):
        main([*TINY, "--dtypes", "4bit"])


@pytest.mark.parametrize("flag", ["batch_size", "num_steps"])
def test_numbers_below_one_are_refused(flag):
    with pytest.raises(ValueError, match=f"`{flag}` must be at least 1, got 0"):
        main([*TINY, f"--{flag}", "0"])


def test_distillation_in_4_bits_is_nothing_to_measure():
    with pytest.raises(ValueError, match="`dtypes` must have bfloat16 for distill_bottleneck, got 4bit"):
        main([*TINY, "--rows", "distill_bottleneck", "--dtypes", "4bit"])


def test_failed_row_names_itself_and_its_cause(tmp_path):
    with pytest.raises(
        RuntimeError, match="The row bottleneck in bfloat16 failed:\n(.|\n)*`seconds` must be from 1 to 10"
    ):
        main([*TINY, "--seconds", "11", "--rows", "bottleneck", "--results_folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_benchmark_stores_a_row_a_process(tmp_path, capsys):
    rows = ["--rows", "lora_llm", "distill_bottleneck", "--dtypes", "4bit"]
    main([*TINY, *rows, "--results_folder", str(tmp_path)])

    stored = json.loads((tmp_path / "domain_memory_tiny_cpu.json").read_text())
    (row,) = stored["rows"]  # the tower alone is not quantised
    assert (row["row"], row["dtype"], row["tokens"]) == ("lora_llm", "4bit", 212)
    assert row["peak_bytes"] > 100e6  # a process with torch in it
    table = (tmp_path / "domain_memory_tiny_cpu.md").read_text()
    assert summarize(stored["rows"]) in table
    assert summarize(stored["rows"]) in capsys.readouterr().out
    assert set(ROWS) == OURS.keys() | STOCK.keys() | DISTILL.keys()
