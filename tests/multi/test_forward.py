"""Models that are run by one forward an item, on every layout: the single process's numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import forward_modules
from tests.forward_models import FAMILIES, Item, alone, items, save

import spanwise
from spanwise.engine.model import Model
from spanwise.errors import (
    DeadlineError,
    EngineError,
    InputError,
    ItemError,
    LayoutError,
    ModelError,
    SupersededError,
)
from spanwise.worker.supervisor import Supervisor

NUM_ITEMS = 13


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    """One fork server for all of this file."""
    supervisor = Supervisor()
    yield supervisor
    supervisor.shutdown()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's name, its saved model, and what the model gives for each item alone."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save(request.param, folder)
    given = items(request.param, NUM_ITEMS)
    return request.param, folder, given, [alone(model, item) for item in given]


def same(got: list[dict[str, Any]], expected: list[dict[str, torch.Tensor]]) -> None:
    """Equal within 1e-5 of the largest number of an output."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one and one.keys() <= other.keys()
        for name, array in one.items():
            wanted = other[name].numpy()
            assert array.shape == wanted.shape, name
            scale = max(1.0, float(np.abs(wanted).max()))
            assert float(np.abs(array - wanted).max()) <= 1e-5 * scale, name


LAYOUTS = [
    {},
    {"devices": "cpu:2", "data_parallel_size": 2},
    {"devices": "cpu:2", "pipeline_parallel_size": 2},
    {"devices": "cpu:2", "tensor_parallel_size": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1", "dp2", "pp2", "tp2"])
def test_every_family_on_every_layout(
    family: Any, layout: dict[str, Any], supervisor: Supervisor
) -> None:
    name, folder, given, expected = family
    shared = supervisor if layout else None
    if "tensor_parallel_size" in layout and not FAMILIES[name].has_tensor_plan:
        with pytest.raises(LayoutError, match="no attention"):
            Model(str(folder), dtype="float32", supervisor=shared, **layout)
        return
    with Model(
        str(folder), dtype="float32", max_batch_size=5, supervisor=shared, **layout
    ) as model:
        same(model.map(given), expected)
        same([model(given[0])], expected[:1])


def test_everything_at_once(tmp_path: Path, supervisor: Supervisor) -> None:
    whole = save("vit", tmp_path)
    given = items("vit", NUM_ITEMS)
    with Model(
        str(tmp_path),
        devices="cpu:8",
        data_parallel_size=2,
        pipeline_parallel_size=2,
        tensor_parallel_size=2,
        dtype="float32",
        max_batch_size=3,
        supervisor=supervisor,
    ) as model:
        assert model.plan.layout.startswith("dp=2 x pp=2 x tp=2")
        same(model.map(given), [alone(whole, item) for item in given])


MODULES = {
    "residual_mlp": [torch.randn(10) for _ in range(9)],
    "unet": [torch.randn(2, 12 + 4 * (i % 2), 16) for i in range(7)],
    "choosing": [torch.randn(8) for _ in range(5)],
}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_of_the_users_own(name: str, stages: int, supervisor: Supervisor) -> None:
    given, whole = MODULES[name], getattr(forward_modules, name)()
    with torch.inference_mode():
        outputs = [whole(item[None]) for item in given]
    expected = [
        {key: value[0] for key, value in out.items()}
        if isinstance(out, dict)
        else {"output": out[0]}
        for out in outputs
    ]
    with Model(
        f"tests.forward_modules:{name}",
        devices=f"cpu:{stages}",
        pipeline_parallel_size=stages,
        max_batch_size=3,
        example=given[0],
        supervisor=supervisor if stages > 1 else None,
    ) as model:
        same(model.map(given), expected)


def test_a_module_that_cannot_be_cut_says_so(supervisor: Supervisor) -> None:
    with pytest.raises(LayoutError, match="one piece"):
        Model(
            "tests.forward_modules:choice",
            devices="cpu:2",
            pipeline_parallel_size=2,
            example=torch.randn(8),
            supervisor=supervisor,
        )


def test_a_module_over_ranks(supervisor: Supervisor) -> None:
    whole = forward_modules.residual_mlp()
    given = MODULES["residual_mlp"]
    with Model(
        "tests.forward_modules:residual_mlp",
        devices="cpu:3",
        tensor_parallel_size=3,
        supervisor=supervisor,
    ) as model:
        bytes_held = [rank.weight_bytes for rank in model.plan.ranks]
        with torch.inference_mode():
            same(model.map(given), [{"output": whole(item[None])[0]} for item in given])
    assert max(bytes_held) < 0.6 * sum(t.nbytes for t in whole.parameters())


@pytest.fixture(scope="module")
def mlps(supervisor: Supervisor) -> Iterator[dict[str, Model]]:
    """The same module on one device, on two replicas and on two stages."""
    name, example = "tests.forward_modules:residual_mlp", MODULES["residual_mlp"][0]
    made = {
        "1": Model(name, max_batch_size=4),
        "dp2": Model(name, devices="cpu:2", max_batch_size=4, supervisor=supervisor),
        "pp2": Model(
            name,
            devices="cpu:2",
            pipeline_parallel_size=2,
            max_batch_size=4,
            example=example,
            supervisor=supervisor,
        ),
    }
    yield made
    for model in made.values():
        model.shutdown()


@pytest.fixture(params=["1", "dp2", "pp2"])
def mlp(request: pytest.FixtureRequest, mlps: dict[str, Model]) -> Model:
    """The module on one of the layouts."""
    return mlps[request.param]


def test_an_item_that_cannot_be_run_is_named_and_harms_no_other(mlp: Model) -> None:
    good = [torch.randn(10) for _ in range(6)]
    futures = [mlp.submit(item) for item in good[:3]]
    try:
        wrong = [mlp.submit(torch.randn(11))]
    except InputError as error:  # a pipeline knows what it takes
        assert "[11]" in str(error) and "[10]" in str(error)
        wrong = []
    futures += [mlp.submit(item) for item in good[3:]]
    for future in wrong:
        with pytest.raises(ItemError, match="could not compute"):
            future.result(20)
    whole = forward_modules.residual_mlp()
    with torch.inference_mode():
        expected = [{"output": whole(item[None])[0]} for item in good]
    same([future.result(20) for future in futures], expected)


def test_what_is_no_item_is_refused_before_it_is_queued(mlp: Model) -> None:
    for item, said in [
        (torch.full((10,), float("nan")), "NaN"),
        ({"numbers": torch.zeros(10)}, "'features' is missing"),
        ("text", "'features'"),
    ]:
        with pytest.raises(InputError, match=said):
            mlp.submit(item)
    with pytest.raises(InputError, match=r"item 2: .*NaN"):
        mlp.map([torch.zeros(10), torch.zeros(10), torch.full((10,), float("nan"))])
    assert len(mlp.map([torch.zeros(10)] * 9)) == 9


def test_futures_of_many_threads(mlp: Model) -> None:
    whole = forward_modules.residual_mlp()
    failures = []

    def work(seed: int) -> None:
        given = torch.randn(20, 10, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected = whole(given).numpy()
        futures = {mlp.submit(row): index for index, row in enumerate(given)}
        for future in as_completed(futures, 30):
            got = future.result()["output"]
            wanted = expected[futures[future]]
            if np.abs(got - wanted).max() > 1e-5 * max(1.0, np.abs(wanted).max()):
                failures.append((seed, futures[future]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []


def test_late_superseded_and_cancelled_items_end_at_once(mlp: Model) -> None:
    blockers = [mlp.submit(torch.randn(10), priority=-1) for _ in range(200)]
    late = mlp.submit(torch.randn(10), deadline_ms=0)
    frames = [mlp.submit(torch.randn(10), stream="camera", priority=1) for _ in range(50)]
    unwanted = mlp.submit(torch.randn(10), priority=2)
    unwanted.cancel()
    with pytest.raises(DeadlineError):
        late.result(20)
    assert frames[-1].result(20)
    ended = [frame.exception(20) for frame in frames[:-1]]
    assert any(isinstance(each, SupersededError) for each in ended)
    assert all(each is None or isinstance(each, SupersededError) for each in ended)
    with pytest.raises(CancelledError):
        unwanted.result(20)
    assert all(future.result(20) for future in blockers)


def test_the_urgent_pass_the_background(mlps: dict[str, Model]) -> None:
    model = mlps["dp2"]
    background = [model.submit(torch.randn(10), priority=5) for _ in range(400)]
    urgent = model.submit(torch.randn(10))
    assert urgent.result(20)
    assert sum(future.done() for future in background) < 400
    assert all(future.result(30) for future in background)


def test_reading_ahead_is_bounded(mlps: dict[str, Model]) -> None:
    taken = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield torch.zeros(10)

    results = mlps["dp2"].imap(endless())
    for _ in range(5):
        next(results)
    results.close()
    assert taken < 100
    assert mlps["dp2"](torch.zeros(10)), "what was read ahead is dropped, and it goes on"


def test_map_of_the_package(supervisor: Supervisor) -> None:
    whole = forward_modules.residual_mlp()
    given = MODULES["residual_mlp"]
    got = spanwise.map(
        "tests.forward_modules:residual_mlp", given, workers=2, supervisor=supervisor
    )
    with torch.inference_mode():
        same(got, [{"output": whole(item[None])[0]} for item in given])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.no_such_module:factory", "cannot be imported"),
        ("tests.forward_modules:nothing", "cannot be imported"),
        ("tests.forward_modules:broken", "no weights today"),
        ("tests.forward_modules:no_module", "gave int"),
        ("no/such/folder", "no model folder"),
    ],
)
@pytest.mark.parametrize("devices", [None, "cpu:2"])
def test_a_model_that_is_none(
    name: str, said: str, devices: str | None, supervisor: Supervisor
) -> None:
    with pytest.raises(ModelError, match=said) as error:
        Model(name, devices=devices, supervisor=supervisor if devices else None)
    assert "\n" not in str(error.value)


def test_a_shut_down_model_says_so(supervisor: Supervisor) -> None:
    model = Model("tests.forward_modules:residual_mlp", devices="cpu:2", supervisor=supervisor)
    pending = [model.submit(torch.randn(10)) for _ in range(300)]
    model.shutdown()
    model.shutdown()
    assert all(future.done() for future in pending)
    with pytest.raises(EngineError, match="shut down"):
        model.submit(torch.randn(10))


def test_a_lost_worker_fails_what_waits_and_no_more_is_taken(supervisor: Supervisor) -> None:
    before = set(supervisor.pids())
    model = Model("tests.forward_modules:residual_mlp", devices="cpu:2", supervisor=supervisor)
    (victim, *_) = [replica.executor for replica in model._loop._core.replicas]
    victim._replica.workers[0].signal(9)  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    with pytest.raises(EngineError, match="signal 9"):
        while time.monotonic() < deadline:
            model.map([torch.zeros(10)] * 8)
    model.shutdown()
    assert set(supervisor.pids()) <= before


def test_a_mapping_is_an_item_too() -> None:
    item: Item = {"features": torch.zeros(10)}
    with Model("tests.forward_modules:residual_mlp") as model:
        assert model(item)["output"].shape == (3,)


def test_what_a_module_asserts_fails_its_item_alone(supervisor: Supervisor) -> None:
    with Model("tests.forward_modules:picky", devices="cpu:2", supervisor=supervisor) as model:
        futures = [model.submit(torch.full((3,), value)) for value in (1.0, 200.0, 2.0)]
        with pytest.raises(ItemError, match="too large"):
            futures[1].result(20)
        # float8 is none of numpy's dtypes
        for future in (futures[0], futures[2]):
            with pytest.raises(ItemError, match="arrays"):
                future.result(20)


def test_inputs_that_a_stage_was_cut_for_are_not_optional(supervisor: Supervisor) -> None:
    with Model(
        "tests.forward_modules:residual_mlp",
        devices="cpu:2",
        pipeline_parallel_size=2,
        supervisor=supervisor,
    ) as model:
        with pytest.raises(InputError, match="'features' is missing"):
            model.submit({})
        with pytest.raises(InputError, match=r"item 1: .*\[11\]"):
            model.map([torch.zeros(10), torch.zeros(11)])
        assert model(torch.zeros(10))


@pytest.mark.parametrize(
    "options",
    [{"deadline_ms": float("inf")}, {"deadline_ms": float("nan")}, {"priority": "high"},
     {"stream": ["a"]}],
)  # fmt: skip
def test_what_cannot_be_waited_for_is_refused(mlp: Model, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        mlp.submit(torch.zeros(10), **options)
    assert mlp.submit(torch.zeros(10), deadline_ms=1e11).result(20), "a deadline in three years"


def test_a_callback_may_shut_the_model_down(supervisor: Supervisor) -> None:
    model = Model("tests.forward_modules:residual_mlp", devices="cpu:2", supervisor=supervisor)
    model.map([torch.zeros(10)] * 8)
    ended = threading.Event()

    def shut_down(_: object) -> None:
        model.shutdown()
        ended.set()

    model.submit(torch.zeros(10)).add_done_callback(shut_down)
    pending = []
    with pytest.raises(EngineError, match="shut down"):
        while True:
            pending.append(model.submit(torch.zeros(10)))
    assert ended.wait(20)
    for future in pending:
        error = future.exception(20)
        assert error is None or "shut down" in str(error)
