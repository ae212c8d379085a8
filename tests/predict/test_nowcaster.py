"""Where nowcasters come from, what they refuse and what they leave alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCABULARY, case_named, gpt2, llama, mlp
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor, nn
from walks import walked

import nino
from nino import CheckpointError, NeuralGraph, NinoError, Nowcaster, NowcasterConfig, NowcastOptimizer, SnapshotError
from nino.predict.engine.views import SnapshotViews
from nino.predict.engine.writer import MovementWriter
from nino.predict.files import CONFIG_FILE, WEIGHTS_FILE, shipped_nowcasters
from nino.predict.model import build_network
from nino.predict.movement import factor_to_keep

CONFIG = NowcasterConfig(hidden=8, context=3, vocabulary_size=7)
WNN_CONFIG = NowcasterConfig(kind="wnn", hidden=8, context=3)


def _nowcaster(config: NowcasterConfig = CONFIG) -> Nowcaster:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Nowcaster(build_network(config))


def _graph() -> NeuralGraph:
    return NeuralGraph.from_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "wide_kernel_cnn"])  # fused layers, tied words, kernels
@pytest.mark.parametrize("engine", ["blockwise", "edges"])
def test_norms_are_kept_if_asked_for(name: str, engine: Any) -> None:
    graph, nowcaster = NeuralGraph.from_model(case_named(name).model(0)), _nowcaster(replace(CONFIG, vocabulary_size=0))
    snapshots = walked(graph, dtype=torch.float64)
    zero = next(n for n, shape in graph.shapes.items() if len(shape) >= 2)
    snapshots[-1][zero] = torch.zeros_like(snapshots[-1][zero])
    free = nowcaster.predict(snapshots, 4, graph, engine=engine)
    kept = nowcaster.predict(snapshots, 4, graph, engine=engine, preserve_norms=True)
    for n, last in snapshots[-1].items():
        factor = last.norm() / free[n].norm() if last.ndim >= 2 and n != zero else 1.0
        torch.testing.assert_close(kept[n], factor * free[n])

    live = {n: last.clone() for n, last in snapshots[-1].items()}
    jump = nowcaster.predict_into(live, snapshots, 4, graph, preserve_norms=True)
    for n, value in live.items():
        torch.testing.assert_close(value, kept[n])
    squares = sum(float((live[n] - last).square().sum()) for n, last in snapshots[-1].items())
    assert jump.distance**2 == pytest.approx(squares, rel=1e-4)
    assert jump.distance**2 == pytest.approx(sum(part.distance**2 for part in jump.by_kind.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_kept_up_to_rounding(dtype: torch.dtype) -> None:
    graph, nowcaster = _graph(), _nowcaster(CONFIG)
    snapshots = walked(graph, dtype=dtype)
    kept = nowcaster.predict(snapshots, 4, graph, preserve_norms=True)
    for name, last in snapshots[-1].items():
        if last.ndim >= 2:
            assert float(kept[name].float().norm() / last.float().norm()) == pytest.approx(1, abs=4e-3)


def test_what_is_predicted_to_be_zero_stays_zero() -> None:
    old, new = torch.tensor([4.0, 0.0, 4.0, 1e-12]).double(), torch.tensor([1.0, 4.0, 0.0, 1.0]).double()
    assert factor_to_keep(old, new).tolist() == [2.0, 1.0, 1.0, 1.0]


def test_norms_that_overflow_are_refused() -> None:
    graph = _graph()
    snapshots = walked(graph)
    name = next(n for n, shape in graph.shapes.items() if len(shape) >= 2)
    for age, snapshot in enumerate(snapshots):
        snapshot[name] = torch.full_like(snapshot[name], 3e4 - 100 * age, dtype=torch.float16)
    tensors = {name: torch.zeros(graph.shapes[name])}
    writer = MovementWriter(graph, tensors, SnapshotViews(graph, snapshots), torch.device("cpu"), preserve_norms=True)
    block = next(block for block in graph.parameter_blocks if block.parameter == name)
    writer._squares[name, block.type] = torch.tensor([1.0, 16.0, 1.0, 16.0], dtype=torch.float64)
    with refused(SnapshotError, name, "is NaN or infinite in torch.float16"):
        writer.finish()


# Saving and loading


TREND_CONFIG = replace(CONFIG, inputs="movements", trend=True)


@pytest.mark.parametrize("config", [CONFIG, WNN_CONFIG, TREND_CONFIG], ids=["nino", "wnn", "nino with a trend"])
def test_saving_and_loading_is_exact(config: NowcasterConfig, tmp_path: Path) -> None:
    saved = _nowcaster(config)
    saved.save_pretrained(tmp_path / "new" / "folder")
    for name in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        loaded = Nowcaster.from_pretrained(name)
        assert loaded.config == saved.config
        assert _equal(loaded.network.state_dict(), saved.network.state_dict())
        assert not loaded.network.training
        assert not any(weights.requires_grad for weights in loaded.network.parameters())
    graph = _graph()
    assert _equal(saved.predict(walked(graph), 7, graph), loaded.predict(walked(graph), 7, graph))


def test_older_releases_read_what_they_can() -> None:
    assert "trend" not in json.loads(CONFIG.to_json()) and json.loads(TREND_CONFIG.to_json())["trend"] is True
    with pytest.raises(CheckpointError, match="a trend wants inputs 'movements', got 'weights'"):
        replace(CONFIG, trend=True)
    with pytest.raises(CheckpointError, match="trend must be true or false, got 'yes'"):
        replace(TREND_CONFIG, trend="yes")


def test_a_nowcaster_with_a_fresh_trend_predicts_the_same() -> None:
    graph, nowcaster = _graph(), _nowcaster(replace(CONFIG, inputs="movements"))
    grown = nowcaster.with_trend()
    assert grown.config == TREND_CONFIG and not nowcaster.config.trend
    assert _equal(nowcaster.predict(walked(graph), 7, graph), grown.predict(walked(graph), 7, graph))
    with pytest.raises(CheckpointError, match="wants inputs 'movements'"):
        _nowcaster(CONFIG).with_trend()


@pytest.mark.parametrize("name", shipped_nowcasters() or [None])
def test_shipped_nowcasters_load_and_predict(name: str | None) -> None:
    if name is None:
        pytest.skip("no nowcaster is shipped")
    nowcaster = Nowcaster.from_pretrained(name)
    graph = _graph()
    snapshots = walked(graph, nowcaster.config.context)
    predicted = nowcaster.predict(snapshots, nowcaster.config.max_horizon, graph)
    assert {name: tuple(tensor.shape) for name, tensor in predicted.items()} == graph.shapes


@pytest.mark.parametrize("name", ["nino-gigantic", "no/such/folder/at/all", "./missing", "/missing/folder", "x" * 300])
def test_unknown_names_are_refused(name: str) -> None:
    with refused(CheckpointError, repr(name), "folder", CONFIG_FILE, "user/name", "from_official"):
        Nowcaster.from_pretrained(name)


def test_what_is_no_name_is_refused() -> None:
    network, model = _nowcaster().network, nn.Linear(2, 3)
    for load in (
        Nowcaster.from_pretrained,
        lambda given: NowcastOptimizer(torch.optim.Adam(model.parameters()), model, given),
    ):
        for given, hint in ((network, "Nowcaster(network)"), (3, "got int"), (None, "got NoneType")):
            with refused(CheckpointError, "a Nowcaster, a name or a folder", type(given).__name__, hint):
                load(given)  # type: ignore[no-untyped-call]


def test_saving_under_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("precious")
    for path in (tmp_path / "a_file", tmp_path / "a_file" / "below"):
        with refused(CheckpointError, path, "cannot be made a folder"):
            _nowcaster().save_pretrained(path)
    assert (tmp_path / "a_file").read_text() == "precious"


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_incomplete_folders_are_refused(file: str, tmp_path: Path) -> None:
    _nowcaster().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with refused(CheckpointError, tmp_path, file, "save_pretrained"):
        Nowcaster.from_pretrained(tmp_path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("these are no weights\nbut two lines"),
        lambda path: path.write_bytes(bytes(range(256)) * 8),
        lambda path: torch.save({"weight": torch.zeros(2)}, path),
        lambda path: save_file({"weight": torch.zeros(2)}, path),
    ],
    ids=["truncated", "empty", "text", "bytes", "pickle", "other weights"],
)
def test_damaged_weights_are_refused(damage: Callable[[Path], object], tmp_path: Path) -> None:
    _nowcaster().save_pretrained(tmp_path)
    damage(tmp_path / WEIGHTS_FILE)
    with refused(CheckpointError, tmp_path / WEIGHTS_FILE):
        Nowcaster.from_pretrained(tmp_path)


def _config(**changes: Any) -> str:
    values = {**json.loads(CONFIG.to_json()), **changes}
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["JSON", CONFIG_FILE]),
        ("{'format': 1}\nsecond line", ["JSON", CONFIG_FILE]),
        ("[1, 2]", ["nino-nowcaster"]),
        ("{}", ["nino-nowcaster"]),
        (_config(format="absent"), ["nino-nowcaster"]),
        (_config(format="nino-trajectory"), ["nino-nowcaster"]),
        (_config(version=99), ["version 99", "reads 1"]),
        (_config(version="absent"), ["version None", "reads 1"]),
        (_config(num_layers=4), ["num_layers"]),
        (_config(kind="transformer"), ["kind", "'nino' or 'wnn'", "'transformer'"]),
        (_config(wiring="magic"), ["wiring", "'magic'"]),
        (_config(hidden=-1), ["hidden", "at least 1", "-1"]),
        (_config(hidden="8"), ["hidden", "'8'"]),
        (_config(context=1), ["context", "at least 2", "1"]),
        (_config(vocabulary_size=-2), ["vocabulary_size", "-2"]),
        (_config(hidden=16), [WEIGHTS_FILE, CONFIG_FILE]),
        (_config(hidden=10**7), [WEIGHTS_FILE, CONFIG_FILE]),
        (_config(kind="wnn"), [WEIGHTS_FILE, CONFIG_FILE]),
        (_config(max_horizon=2), [WEIGHTS_FILE, CONFIG_FILE]),
        (_config(context=5), [WEIGHTS_FILE, CONFIG_FILE, "edge_proj.weight"]),
    ],
)
def test_configs_that_are_foreign_or_of_other_sizes_are_refused(text: str, words: list[str], tmp_path: Path) -> None:
    _nowcaster().save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with refused(CheckpointError, *words):
        Nowcaster.from_pretrained(tmp_path)


def test_a_config_that_is_not_text_is_refused(tmp_path: Path) -> None:
    _nowcaster().save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    with refused(CheckpointError, tmp_path / CONFIG_FILE):
        Nowcaster.from_pretrained(tmp_path)


# The hub


def test_hub_ids_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved = _nowcaster()
    saved.save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = Nowcaster.from_pretrained("someone/nowcaster")
    assert asked == [("someone/nowcaster", CONFIG_FILE), ("someone/nowcaster", WEIGHTS_FILE)]
    assert _equal(loaded.network.state_dict(), saved.network.state_dict())


class ForeignError(Exception):
    """Of a library that the hub client uses, unknown to us."""


@pytest.mark.parametrize(
    "failure", [OSError("no route to host\nsecond line"), ValueError("bad id"), ForeignError("timed out"), OSError()]
)
def test_hub_failures_are_one_clear_line(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any) -> str:
        raise failure

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    reason = str(failure).split("\n")[0] or type(failure).__name__
    with refused(CheckpointError, "'someone/nowcaster'", "no local folder", "hub", reason):
        Nowcaster.from_pretrained("someone/nowcaster")


def test_hub_ids_without_a_network_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, told to stay offline, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refused(CheckpointError, "someone/nowcaster-that-is-not-there", "hub"):
        Nowcaster.from_pretrained("someone/nowcaster-that-is-not-there")


# The published files


def _published_state(config: NowcasterConfig = CONFIG) -> dict[str, Tensor]:
    """A state dict with the published names, the third convolution included."""
    published = {
        "type_embed.": "layer_embed.",
        "word_embed.": "wte_pos_enc_layer.",
        "node_proj.": "node_proj.fc.0.",
        "edge_proj.": "edge_proj.fc.0.",
        "convs.": "gnn.convs.",
        ".pre.": ".pre_nns.0.0.",
        ".post.": ".post_nns.0.0.",
        "edge_updates.": "gnn.edge_update.",
        ".from_edge.": ".lin_e.",
        ".from_source.": ".lin_s.",
        ".from_target.": ".lin_t.",
    }
    if config.kind == "wnn":
        published |= {"body.": "edge_mlp.fc.", "head.": "edge_mlp.fc.6."}
    else:
        published |= {"head_hidden.": "edge_out.fc.0.", "head.": "edge_out.fc.2."}
    state = {}
    for ours, value in _nowcaster(config).network.state_dict().items():
        name = ours
        for mine, theirs in published.items():
            name = name.replace(mine, theirs)
        name = re.sub(r"(edge_update\.\d)\.lin\.", r"\1.lin1.", name)
        state[name] = value
        if name.startswith("gnn.convs.1."):
            state[name.replace("convs.1.", "convs.2.")] = torch.full_like(value, torch.nan)  # nothing may read it
    return state


@pytest.mark.parametrize("config", [CONFIG, WNN_CONFIG], ids=["nino", "wnn"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_published_files_load(config: NowcasterConfig, nested: bool, tmp_path: Path) -> None:
    state = _published_state(config)
    content = {"state_dict": state, "model_args": {"hid": 8, "gnn": True}, "step": 20000} if nested else state
    torch.save(content, tmp_path / "published.pt")
    loaded = Nowcaster.from_official(tmp_path / "published.pt")
    assert (loaded.config.kind, loaded.config.hidden, loaded.config.context) == (config.kind, 8, 3)
    assert loaded.config.max_horizon == config.max_horizon
    assert loaded.config.vocabulary_size == config.vocabulary_size
    assert loaded.config.wiring == "official"
    assert _equal(loaded.network.state_dict(), _nowcaster(config).network.state_dict())
    loaded.save_pretrained(tmp_path / "converted")
    again = Nowcaster.from_pretrained(tmp_path / "converted")
    assert again.config == loaded.config
    assert _equal(again.network.state_dict(), loaded.network.state_dict())


def _save(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _truncated_published(path: Path) -> None:
    torch.save(_published_state(), path)
    _truncate(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("no weights"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x02\x8a\x00\x00"),
        lambda path: path.write_bytes(random.Random(0).randbytes(300)),
        _truncated_published,
        _save(torch.zeros(3)),
        _save([1, 2]),
        _save({}),
        _save({"state_dict": None}),
        _save({"state_dict": {"step": 3}}),
        _save({0: torch.zeros(2)}),
        _save({"layer.weight": torch.zeros(2, 2)}),
        _save({"edge_proj.fc.0.weight": torch.zeros(2)}),
        _save({"edge_proj.fc.0.weight": torch.tensor(1.0)}),
        _save({"edge_proj.fc.0.weight": torch.zeros(0, 0)}),
        _save({**_published_state(), "edge_out.fc.2.weight": torch.tensor(1.0)}),
        _save({**_published_state(), "one.more": torch.zeros(2)}),
        _save({**_published_state(), "node_proj.fc.0.bias": torch.zeros(2)}),
        _save({name: value for name, value in _published_state().items() if "lin_t" not in name}),
        lambda path: torch.save({"state_dict": _published_state(), "a": Attack(path.with_name("attacked"))}, path),
    ],
)
def test_published_files_that_are_none_are_refused(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    write(path)
    with refused(CheckpointError, path):
        Nowcaster.from_official(path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_missing_published_files_are_refused(name: str, tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / name, "expected a published NiNo .pt file"):
        Nowcaster.from_official(tmp_path / name)


# What predict refuses


def spoilt(age: int, name: str, change: Callable[[Tensor], Any]) -> list[dict[str, Any]]:
    """Snapshots in one of which a parameter is another one; none if it becomes ``None``."""
    snapshots: list[dict[str, Any]] = walked(_graph())
    changed = change(snapshots[age].pop(name))
    if changed is not None:
        snapshots[age][name] = changed
    return snapshots


def holding(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        *((SnapshotError, ["3 snapshots", f"got {n}"], {"snapshots": walked(_graph(), n)}) for n in (0, 2, 4)),
        *(
            (SnapshotError, [f"snapshot {age}", "2.bias", "NaN"], {"snapshots": spoilt(age, "2.bias", holding(value))})
            for age in (0, 2)
            for value in (torch.nan, torch.inf, -torch.inf)
        ),
        *(
            (SnapshotError, ["snapshot 1", "2.bias", what], {"snapshots": spoilt(1, "2.bias", change)})
            for what, change in (
                ("", lambda tensor: None),
                ("meta", lambda tensor: tensor.to("meta")),
                ("torch.int8", lambda tensor: tensor.to(torch.int8)),
                ("torch.complex64", lambda tensor: tensor.to(torch.complex64)),
                ("ndarray", Tensor.numpy),
            )
        ),
        (SnapshotError, ["snapshot 1", "0.weight", (4, 5), (5, 4)], {"snapshots": spoilt(1, "0.weight", Tensor.t)}),
        *((NinoError, ["horizon", "1 to 40", repr(h)], {"horizon": h}) for h in (0, -1, 41, 2.5, "20", None, True)),
        (NinoError, ["engine", "'blockwise' or 'edges'", "'fast'"], {"engine": "fast"}),
        *((NinoError, ["memory", "budget", n, "bytes"], {"memory_budget": n}) for n in (1e9, "1GB", 0, -1)),
        *(
            (NinoError, ["dtype", "floating point", repr(dtype)], {"dtype": dtype})
            for dtype in (torch.int32, "float32", torch.float8_e4m3fn, None)
        ),
        *(  # 4 inputs, 5 hidden and 3 output neurons, 2 bias nodes: 14 nodes
            (NinoError, ["positions", (14, 8), shape], {"positions": torch.zeros(shape)})
            for shape in ((11, 8), (14, 7), (14,))
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(error: type[Exception], words: list[Any], settings: dict[str, Any]) -> None:
    with refused(error, *words):
        _nowcaster().predict(**{"snapshots": walked(_graph()), "horizon": 5, "graph": _graph(), **settings})


def test_snapshots_of_another_model_are_refused() -> None:
    other = NeuralGraph.from_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()))
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Identity(), nn.Linear(5, 3)))
    with refused(SnapshotError, "3.weight", "snapshot 0"):
        _nowcaster().predict(walked(other), 5, graph)


def test_other_entries_of_snapshots_are_ignored() -> None:
    snapshots = walked(_graph())
    with_buffers = [{**snapshot, "1.running_mean": torch.zeros(3)} for snapshot in snapshots]
    assert _equal(_nowcaster().predict(with_buffers, 5, _graph()), _nowcaster().predict(snapshots, 5, _graph()))


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
def test_a_prediction_that_is_not_finite_is_refused(engine: Any) -> None:
    graph = _graph()
    nowcaster = _nowcaster()
    nowcaster.network.head.bias.fill_(torch.nan)
    with refused(SnapshotError, "NaN", "refused"):
        nowcaster.predict(walked(graph), 5, graph, engine=engine)


@pytest.mark.parametrize("graph", [None, nn.Linear(4, 5), "exact"])
def test_the_graph_is_checked(graph: Any) -> None:
    snapshots = walked(_graph())
    for predict in (_nowcaster().predict, lambda *given: _nowcaster().predict_into(snapshots[-1], *given)):
        with refused(NinoError, "NeuralGraph", f"got {type(graph).__name__}", "graph_of(model)"):
            predict(snapshots, 5, graph)  # type: ignore[no-untyped-call]


def test_the_ends_of_the_horizon_are_allowed() -> None:
    graph = _graph()
    near, far = (_nowcaster().predict(walked(graph), horizon, graph) for horizon in (1, 40))
    assert all(value.isfinite().all() and not torch.equal(value, far[name]) for name, value in near.items())


def test_vocabularies_larger_than_the_word_table_are_refused() -> None:
    model = gpt2(n_layer=1)
    graph = NeuralGraph.from_model(model)
    with refused(CheckpointError, "6 words", VOCABULARY):  # a table of 7 rows: 6 words and all other neurons
        _nowcaster().predict(walked(graph), 5, graph)
    with pytest.raises(CheckpointError):
        _nowcaster().check_fits(graph)
    fits = _nowcaster(NowcasterConfig(hidden=8, context=3, vocabulary_size=VOCABULARY + 1))
    assert fits.predict(walked(graph), 5, graph).keys() == graph.shapes.keys()


# What predict returns and leaves alone


@pytest.mark.parametrize("config", [CONFIG, WNN_CONFIG], ids=["nino", "wnn"])
@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_snapshots_of_any_precision(config: NowcasterConfig, engine: Any, dtype: torch.dtype) -> None:
    graph = _graph()
    nowcaster = _nowcaster(config)
    snapshots = walked(graph, dtype=dtype)
    predicted = nowcaster.predict(snapshots, 5, graph, engine=engine)
    same = [{name: tensor.float() for name, tensor in snapshot.items()} for snapshot in snapshots]
    expected = nowcaster.predict(same, 5, graph, engine=engine)
    for name in graph.shapes:
        assert predicted[name].dtype == dtype
        torch.testing.assert_close(predicted[name], expected[name].to(dtype))


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
def test_a_network_in_bfloat16_does_not_round_the_weights(engine: Any) -> None:
    """Where the network predicts no movement, the last snapshot comes back in full precision."""
    graph = _graph()
    nowcaster = _nowcaster()
    nowcaster.network.head.weight.zero_()
    nowcaster.network.head.bias.zero_()
    snapshots = walked(graph)
    predicted = nowcaster.predict(snapshots, 5, graph, engine=engine, dtype=torch.bfloat16)
    for name in graph.shapes:
        torch.testing.assert_close(predicted[name], snapshots[-1][name], rtol=1e-5, atol=1e-5)


def test_the_prediction_shares_no_memory_with_thewalked() -> None:
    graph = _graph()
    snapshots = walked(graph)
    predicted = _nowcaster().predict(snapshots, 5, graph)
    storages = {tensor.untyped_storage().data_ptr() for snapshot in snapshots for tensor in snapshot.values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in predicted.values()}


@pytest.mark.parametrize("config", [CONFIG, WNN_CONFIG], ids=["nino", "wnn"])
@pytest.mark.parametrize("engine", ["blockwise", "edges"])
def test_nothing_else_changes(config: NowcasterConfig, engine: Any) -> None:
    """Weights, snapshots, random state and gradient mode; and no call leaves a trace in a later one."""
    graph = _graph()
    nowcaster = _nowcaster(config)
    snapshots = walked(graph)
    positions = graph.positions()
    weights = {name: value.clone() for name, value in nowcaster.network.state_dict().items()}
    copies = [{name: tensor.clone() for name, tensor in snapshot.items()} for snapshot in snapshots]
    given = positions.clone()
    with _untouched_randomness():
        alone = nowcaster.predict(snapshots, 5, graph, positions, engine)
        nowcaster.predict(snapshots, 9, graph, positions, engine, torch.bfloat16)
        nowcaster.predict(snapshots, 40, graph, positions, engine, torch.float64)
        again = nowcaster.predict(snapshots, 5, graph, positions, engine)
    assert _equal(alone, again)
    assert _equal(nowcaster.network.state_dict(), weights)
    assert all(value.dtype == torch.float32 for value in nowcaster.network.state_dict().values())
    assert all(_equal(snapshot, copy) for snapshot, copy in zip(snapshots, copies, strict=True))
    assert torch.equal(positions, given)
    assert torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in again.values())


def test_live_parameters_may_bewalked() -> None:
    graph = _graph()
    snapshots = walked(graph)
    live = [{name: nn.Parameter(tensor) for name, tensor in snapshot.items()} for snapshot in snapshots]
    predicted = _nowcaster().predict(live, 5, graph)
    assert _equal(predicted, _nowcaster().predict(snapshots, 5, graph))
    assert not any(tensor.requires_grad for tensor in predicted.values())


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """A run that loads a nowcaster sees the same data and dropout as one that does not."""
    nowcaster = _nowcaster()
    nowcaster.save_pretrained(tmp_path)
    torch.save(_published_state(), tmp_path / "published.pt")
    with _untouched_randomness():
        Nowcaster.from_pretrained(tmp_path)
        Nowcaster.from_official(tmp_path / "published.pt")


class _untouched_randomness:
    def __enter__(self) -> None:
        self.before = self.state()

    def __exit__(self, *error: object) -> None:
        assert error[0] is not None or self.state() == self.before

    def state(self) -> list[Any]:
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


def test_graph_of_follows_the_wiring_and_falls_back_to_the_exact_one(caplog: pytest.LogCaptureFixture) -> None:
    official = _nowcaster(NowcasterConfig(hidden=8, wiring="official"))
    assert official.graph_of(mlp()).wiring == "official"
    assert not caplog.records
    assert official.graph_of(llama()).wiring == "exact"
    assert "were not trained" in caplog.text
    assert _nowcaster().graph_of(mlp()).wiring == "exact"


@pytest.mark.parametrize(("trained", "used"), [("official", "exact"), ("exact", "official")])
def test_another_wiring_than_the_trained_one_is_said_once(
    trained: Any, used: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nowcaster = _nowcaster(NowcasterConfig(hidden=8, context=3, wiring=trained))
    right, wrong = (NeuralGraph.from_model(gpt2(n_layer=1), wiring) for wiring in (trained, used))
    nowcaster.predict(walked(right), 5, right)
    assert not caplog.records
    for _ in range(2):
        nowcaster.predict(walked(wrong), 5, wrong)
    assert len(caplog.messages) == 1
    assert f"trained on the {trained} wiring" in caplog.text
    assert "graph_of" in caplog.text


def test_what_graph_of_has_said_of_the_wiring_is_not_said_again(caplog: pytest.LogCaptureFixture) -> None:
    nowcaster = _nowcaster(NowcasterConfig(hidden=8, context=3, wiring="official"))
    graph = nowcaster.graph_of(llama())
    caplog.clear()
    nowcaster.predict(walked(graph), 5, graph)
    assert not caplog.records


def test_errors_are_value_errors() -> None:
    for error in (CheckpointError, SnapshotError, nino.GraphError, nino.TrajectoryError):
        assert issubclass(error, NinoError)
        assert issubclass(error, ValueError)


# What it reads


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
def test_a_nowcaster_of_movements_predicts_in_their_own_unit(engine: Any) -> None:
    """Snapshots that lie a tenth as far apart are predicted to move a tenth as far; not so if it reads weights."""
    graph = _graph()
    wide = walked(graph, dtype=torch.float64)
    last = wide[-1]
    narrow = [{name: last[name] + 0.1 * (snapshot[name] - last[name]) for name in last} for snapshot in wide]
    # The last snapshot is standardised by the mean and deviation of all, which change a little.
    for inputs, is_alike in (("movements", True), ("weights", False)):
        nowcaster = _nowcaster(replace(CONFIG, inputs=inputs))
        far, near = (
            nowcaster.predict(snapshots, 3, graph, engine=engine, dtype=torch.float64) for snapshots in (wide, narrow)
        )
        moved, less = (torch.cat([(new[name] - last[name]).flatten() for name in last]) for new in (far, near))
        assert (float((less - 0.1 * moved).norm() / (0.1 * moved.norm())) < 0.15) == is_alike
