"""Our models pass timm's own tests: what timm promises of any model in its registry, it promises of these.

Eleven models are minutes of work, so they run in three parts, each once in a test session. Under pytest-xdist a worker
that finds a part running runs another one meanwhile, so the workers share them however the tests are distributed.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import timm_contract
from filelock import FileLock, Timeout

PARTS = {  # of about the same length: -k expression -> models
    "dhvt and cifar": [
        "dhvt_tiny_cifar_patch4",
        "dhvt_small_cifar_patch4",
        "dhvt_tiny_cifar_patch2",
        "dhvt_small_cifar_patch2",
    ],
    "dhvt and not cifar": [
        "dhvt_tiny_domain_patch16",
        "dhvt_small_domain_patch16",
        "dhvt_tiny_imagenet_patch16",
        "dhvt_small_imagenet_patch16",
    ],
    "shrink_base": [
        "deit_tiny_patch16_shrink_base",
        "deit_small_patch16_shrink_base",
        "deit_base_patch16_shrink_base",
    ],
}

# All that timm has for a model with forward_intermediates, whose features are tokens and which TorchScript and FX can
# follow. Not among them: test_model_default_cfgs (for features on a spatial grid), test_model_forward_features (for
# convolutional stages), test_model_inference (for published weights).
TESTS = [
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_torchscript",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
]


def run_once(part: str, report: Path) -> None:
    """Run timm's tests of one part, unless a worker has done so; keep the outcomes, or the error, beside the report."""
    result = report.with_suffix(".pickle")
    if result.exists():
        return
    try:
        outcomes = timm_contract.run(part, ["dhvt*"], ["dhvt", "evit"], report)
    except Exception as error:  # kept for the part's other models, whose tests then say the same
        outcomes = error
    result.write_bytes(pickle.dumps(outcomes))


@pytest.fixture(scope="session")
def outcomes_of(tmp_path_factory) -> Callable[[str], list]:
    """Return a function from a model to the outcomes of timm's tests, which runs its part if no worker has."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's own folder lies in that of the whole session
    reports = {part: folder / f"timm_{i}.xml" for i, part in enumerate(PARTS)}

    def outcomes_of(model: str) -> list:
        own = next(part for part, names in PARTS.items() if model in names)
        for part in [own, *PARTS]:
            try:
                with FileLock(reports[part].with_suffix(".lock"), blocking=False):
                    run_once(part, reports[part])
            except Timeout:
                continue  # another worker is at it
            if part == own:
                break
        with FileLock(reports[own].with_suffix(".lock")):
            run_once(own, reports[own])
        outcomes = pickle.loads(reports[own].with_suffix(".pickle").read_bytes())
        if isinstance(outcomes, timm_contract.CannotFetchError):
            pytest.skip(f"timm's own tests do not come with it, and pip could not fetch them: {outcomes}")
        if isinstance(outcomes, Exception):
            raise outcomes
        return outcomes.get(model, [])

    return outcomes_of


def test_every_registered_model_is_tested():
    assert sorted(sum(PARTS.values(), [])) == sorted(timm.list_models(module=["dhvt", "evit"]))


@pytest.mark.parametrize("model", [name for names in PARTS.values() for name in names])
def test_model_passes_timms_own_tests(model, outcomes_of):
    outcomes = outcomes_of(model)
    assert sorted(outcome.test for outcome in outcomes) == sorted(TESTS)
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []
