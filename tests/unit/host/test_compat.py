"""What is installed in Megatron, and what differs between its versions."""

import pytest
import torch

from megatron_moe_inject import install
from megatron_moe_inject.host import compat

WRAPPED = (
    ("megatron.training.arguments", "add_megatron_arguments"),
    ("megatron.training.training", "pretrain"),
    ("megatron.training", "pretrain"),
    ("megatron.training.training", "setup_model_and_optimizer"),
    ("megatron.training.training", "get_megatron_optimizer"),
    ("megatron.training.training", "build_train_valid_test_data_iterators"),
    ("megatron.training.training", "get_forward_backward_func"),
    ("megatron.training.training", "train"),
    ("megatron.training.training", "get_train_valid_test_num_samples"),
    ("megatron.training.training", "build_train_valid_test_datasets"),
    ("megatron.training.training", "build_pretraining_data_loader"),
    ("megatron.training.training", "evaluate_and_print_results"),
)


def test_installing_twice_changes_nothing_and_keeps_the_stock_functions(monkeypatch):
    import importlib

    modules = [(importlib.import_module(module), name) for module, name in WRAPPED]
    for module, name in modules:
        stock = getattr(module, name)
        monkeypatch.setattr(module, name, getattr(stock, "__wrapped__", stock))
    stock = [getattr(module, name) for module, name in modules]
    install()
    once = [getattr(module, name) for module, name in modules]
    install()
    twice = [getattr(module, name) for module, name in modules]
    assert all(a is b for a, b in zip(once, twice, strict=True))
    assert all(a.__wrapped__ is b for a, b in zip(once, stock, strict=True))


def test_weights_are_used_only_after_the_modules_pre_hooks():
    layer, log = torch.nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda module, args: log.append(("plain", len(args))))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: log.append(("kwargs", kwargs)), with_kwargs=True
    )
    compat.run_forward_pre_hooks(layer, torch.ones(1, 2))
    assert log == [("plain", 1), ("kwargs", {})]


@pytest.mark.parametrize("own", [True, False])
def test_the_version_names_a_commit_of_megatrons_own_checkout_alone(monkeypatch, tmp_path, own):
    inside = tmp_path / "megatron" / "core" / "package_info.py"
    inside.parent.mkdir(parents=True)
    if own:
        (tmp_path / ".git").mkdir()
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__file__", str(inside))
    monkeypatch.setattr(package_info, "__version__", "0.19.2+abc1234")
    assert compat.megatron_version() == ("0.19.2+abc1234" if own else "0.19.2")
