"""TD-MPC2's world models, in all layouts that its code has written, read without executing their pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

from pwm_gym.checkpoints.hub import local_file
from pwm_gym.checkpoints.layers import Layer, latent_order, layers_of, put_layers, read_layers, reorder
from pwm_gym.foreign import read_torch_file
from pwm_gym.normalization import Normalizer
from pwm_gym.serialization import atomic_write
from pwm_gym.task_sets import TASK_DIMS
from pwm_gym.task_sets import tasks as tasks_of
from pwm_gym.world_model import WorldModel, WorldModelConfig
from pwm_gym.world_model.planning_heads import LOG_STD_MAX, LOG_STD_MIN

__all__ = ["export_tdmpc2", "load_tdmpc2", "make_model", "pick_tensors"]


class _Part(NamedTuple):
    """One network of a world model."""

    ours: str  # name of the module
    prefixes: tuple[str, ...]  # of its keys, in the current and in older layouts
    reads_latent: bool = True
    writes_latent: bool = False
    layers: int | None = 3
    ensemble: bool = False


_PARTS = (
    _Part("encoder", ("_encoder.state.", "_encoder."), reads_latent=False, writes_latent=True, layers=None),
    _Part("dynamics", ("_dynamics.",), writes_latent=True),
    _Part("reward_head", ("_reward.",)),
    _Part("termination_head", ("_termination.",)),
    _Part("policy_prior.net", ("_pi.",)),
    _Part("value.online", ("_Qs.params.",), ensemble=True),
    _Part("value.target", ("_target_Qs_params.", "_target_Qs.params."), ensemble=True),
)
_REQUIRED = ("encoder", "dynamics", "reward_head")
# Beside the parts; and copies of the values, which current versions also save.
_OTHER_KEYS = ("_task_emb.weight", "_action_masks", "log_std_min", "log_std_dif")
_COPIES = ("_Qs.module.", "_detach_Qs", "_target_Qs.module.")


# Reading


def pick_tensors(content: Any, where: str) -> dict[str, Tensor]:
    """Pick a world model's tensors out of a `state_dict`, without bookkeeping and copies."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"expected a world model's state_dict {where}, got {type(content).__name__}.")
    entries = {
        key: value
        for key, value in content.items()
        if isinstance(value, Tensor) and not value.is_meta and not key.startswith(_COPIES)
    }
    if any(key.startswith("_encoder.rgb.") for key in entries):
        raise ValueError(f"expected a world model of vector observations {where}, got one of pixels.")
    known = tuple(prefix for part in _PARTS for prefix in part.prefixes) + _OTHER_KEYS
    unknown = [key for key in entries if not key.startswith(known)]
    if unknown:
        raise ValueError(f"expected the parts of TD-MPC2's world model {where}, got also {unknown[:5]}.")
    return entries


def _parts(entries: Mapping[str, Tensor]) -> dict[str, list[Layer]]:
    """Read the layers of each part that is there."""
    parts = {}
    for part in _PARTS:
        found = [prefix for prefix in part.prefixes if any(key.startswith(prefix) for key in entries)]
        if not found:
            if part.ours in _REQUIRED:
                raise ValueError(f"expected {part.prefixes[0]}*, got no such keys among {sorted(entries)[:5]}....")
            continue
        layers = read_layers(entries, found[0], part.ensemble)
        if part.layers not in (None, len(layers)):
            names = [layer.name for layer in layers]
            raise ValueError(f"expected {part.layers} layers in {found[0]}*, got {len(layers)}: {names}.")
        parts[part.ours] = layers
    return parts


def _infer_config(entries: Mapping[str, Tensor], parts: Mapping[str, list[Layer]]) -> dict[str, Any]:
    """Tell a model's sizes by the shapes of its weights."""
    embedding = entries.get("_task_emb.weight")
    if embedding is not None and embedding.ndim != 2:
        raise ValueError(f"expected '_task_emb.weight' of shape (tasks, width), got {tuple(embedding.shape)}.")
    task_dim = 0 if embedding is None else embedding.shape[1]
    encoder, dynamics = parts["encoder"], parts["dynamics"]
    latent_dim = encoder[-1].out_features
    fields: dict[str, Any] = {
        "observation_dim": encoder[0].in_features - task_dim,
        "action_dim": dynamics[0].in_features - latent_dim - task_dim,
        "latent_dim": latent_dim,
        "encoder_layers": len(encoder) - 1,
        "encoder_dim": encoder[0].out_features,
        "mlp_dim": dynamics[0].out_features,
        "num_bins": parts["reward_head"][-1].out_features,
        "termination_head": "termination_head" in parts,
        "policy_prior": "policy_prior.net" in parts,
        "num_q": len(parts["value.online"][0].weight) if "value.online" in parts else 0,
    }
    if embedding is not None:
        fields |= {"num_tasks": len(embedding), "task_dim": task_dim}
    return fields


def _discount(task: str) -> float:
    """γ that TD-MPC2 gives the values of a published task, by the length of its episodes."""
    decisions = 100 if task.startswith("mw-") else 500
    return min(max((decisions / 5 - 1) / (decisions / 5), 0.95), 0.995)


def _task_fields(tasks: str | Sequence[str] | None, entries: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tell the tasks' names, discounts, and what of their observations and actions is padding."""
    count = len(entries["_task_emb.weight"]) if "_task_emb.weight" in entries else 1
    names = tasks_of(tasks) if isinstance(tasks, str) else tuple(tasks or ())
    if tasks is not None and len(names) != count:
        raise ValueError(f"expected the names of the file's {count} tasks, got {len(names)} in tasks={tasks!r}.")
    fields: dict[str, Any] = {"tasks": names}
    is_published = bool(names) and all(name in TASK_DIMS for name in names)
    if is_published:
        fields["discounts"] = tuple(_discount(name) for name in names)
    if "_task_emb.weight" not in entries:
        if "_action_masks" in entries:
            raise ValueError("expected '_task_emb.weight' beside '_action_masks', got none.")
        return fields
    if is_published:
        fields["observation_dims"] = tuple(TASK_DIMS[name].observation for name in names)
        fields["action_dims"] = tuple(TASK_DIMS[name].action for name in names)
    if "_action_masks" in entries:
        masks = entries["_action_masks"]
        widths = masks.sum(-1).long()
        if len(masks) != count or not torch.equal(masks, (torch.arange(masks.shape[1]) < widths[:, None]).float()):
            raise ValueError("expected one mask of leading ones for each task in '_action_masks', got something else.")
        action_dims = tuple(widths.tolist())
        if fields.setdefault("action_dims", action_dims) != action_dims:
            raise ValueError(
                f"expected tasks with {action_dims} action dimensions, as the file's '_action_masks' say, got tasks "
                f"with {fields['action_dims']}. Give the tasks in the order that the model was trained with."
            )
    return fields


def make_model(
    entries: Mapping[str, Tensor],
    tasks: str | Sequence[str] | None,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    **fields: Any,
) -> WorldModel:
    """Make a world model with the weights of a `state_dict`."""
    parts = _parts(entries)
    config = WorldModelConfig(**{**_infer_config(entries, parts), **_task_fields(tasks, entries), **fields})
    with torch.random.fork_rng(devices=[]):  # its random weights are overwritten
        model = WorldModel(config, observation_space, action_space)
    order = latent_order(config.latent_dim, config.simnorm_dim)
    if "value.online" in parts:
        parts.setdefault("value.target", parts["value.online"])
    for part in _PARTS:
        if part.ours in parts:
            inputs, outputs = order if part.reads_latent else None, order if part.writes_latent else None
            put_layers(reorder(parts[part.ours], inputs, outputs), model.get_submodule(part.ours))
    if model.task_embedding is not None:
        model.task_embedding.weight.data.copy_(entries["_task_emb.weight"])
    # Versions of early 2025 always saved this head: its biases are still 0 where it was never trained.
    if any(layer.bias.any() for layer in parts.get("termination_head", ())):
        model.expect_termination()
    return model.eval()


def load_tdmpc2(
    source: str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
) -> WorldModel:
    """Read a world model that TD-MPC2's code saved (github.com/nicklashansen/tdmpc2), of any size and layout.

    Sizes are told by the shapes. Value ensemble, policy prior and termination head are kept where the file has them.
    The model predicts what TD-MPC2's code does; its latents hold the same features in another order
    (`pwm_gym.checkpoints.layers.latent_order`).

    Args:
        source: A file, or one on the Hugging Face hub as "hf://owner/repository/path/in/it".
        tasks: Names of the tasks in the order of the model's task index: "MT30", "MT80", or a sequence. For published
            tasks, they also tell discounts and padding. None for a model whose tasks go by index alone.
        device: Where the model goes.
        observation_space: Real observation space (padded, for several tasks); None for an unbounded Box.
        action_space: Real action space; None for [-1, 1]^A.
        simnorm_dim: Features in a SimNorm group. No file tells it, nor the next two; these are TD-MPC2's defaults.
        vmin: Lowest bin of rewards and values, in symlog units.
        vmax: Highest bin.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file, here or on the hub.
        ImportError: If the file is on the hub and huggingface_hub is not installed.
        UnsafeFileError: If the file holds pickled code; it is not executed.
        ValueError: If the file is damaged, incomplete or no such model, or tasks or spaces don't fit it.

    Example:
        >>> import pathlib, tempfile
        >>> model = WorldModel(WorldModelConfig.preset("1M", observation_dim=24, action_dim=6, planning=True))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "walker-walk.pt")
        >>> export_tdmpc2(model, file)
        >>> load_tdmpc2(file).config.num_q
        2
    """
    path = local_file(source)
    content = read_torch_file(path)
    if isinstance(content, dict):
        content = content.get("model", content)
    entries = pick_tensors(content, f"in {os.fspath(path)!r}")
    expected = {"log_std_min": LOG_STD_MIN, "log_std_dif": LOG_STD_MAX - LOG_STD_MIN}
    for key, value in expected.items():
        if key in entries and abs(float(entries[key]) - value) > 1e-6:
            raise ValueError(f"expected {key!r} of {value}, TD-MPC2's own, got {float(entries[key])}.")
    bins = {"simnorm_dim": simnorm_dim, "vmin": vmin, "vmax": vmax}
    model = make_model(entries, tasks, observation_space, action_space, **bins)
    if model.config.num_bins == 1:
        raise ValueError(
            f"expected a reward in bins (num_bins >= 2 in TD-MPC2's config) in {os.fspath(path)!r}, got a scalar one, "
            f"of which the file doesn't tell whether it is in symlog units."
        )
    return model.to(device)


# Writing


def export_tdmpc2(world_model: WorldModel, path: str | os.PathLike[str], layout: str = "current") -> None:
    """Write a world model as TD-MPC2's code does, atomically.

    Where observations are normalised, that becomes part of the encoder's first layer, except that nothing is clipped.

    Args:
        world_model: The model. TD-MPC2 knows no other latents than SimNorm's and no features extractor.
        path: The file.
        layout: "current" for TD-MPC2 since 2025, which needs value ensemble and policy prior; "original" for
            its earlier versions and for PWM's code, which doesn't need them. Current versions convert the original.

    Raises:
        ValueError: If the model is of a kind that TD-MPC2 has no form for.
    """
    config = world_model.config
    if (config.regularizer, config.activation) != ("simnorm", "mish") or world_model.features_extractor is not None:
        raise ValueError(
            f"expected a model with regularizer 'simnorm', activation 'mish' and no features extractor, as TD-MPC2's "
            f"are, got {config.regularizer!r}, {config.activation!r} and {world_model.features_extractor}."
        )
    if layout not in ("current", "original"):
        raise ValueError(f"`layout` must be 'current' or 'original', got {layout!r}.")
    current = layout == "current"
    if current and not (config.num_q and config.policy_prior):
        raise ValueError(
            "expected a value ensemble and a policy prior, without which TD-MPC2 can't load a model. Make the model "
            "with WorldModelConfig.preset(..., planning=True), or give layout='original' for PWM's code."
        )
    order = latent_order(config.latent_dim, config.simnorm_dim).argsort()
    state: dict[str, Any] = {}
    if world_model.task_embedding is not None:
        state["_task_emb.weight"] = world_model.task_embedding.weight.detach()
        if current:
            masks = [world_model.action_mask(i) for i in range(config.num_tasks)]
            state["_action_masks"] = torch.stack(masks)
    for part in _PARTS:
        if not _has(world_model, part):
            continue
        net = world_model.get_submodule(part.ours)
        layers = layers_of(net)
        if part.ours == "encoder" and world_model.normalizer is not None:
            layers[0] = _on_raw_observations(layers[0], world_model.normalizer)
        layers = reorder(layers, order if part.reads_latent else None, order if part.writes_latent else None)
        if part.ensemble and not current:
            state |= _flat_entries(part.prefixes[-1], layers)
            continue
        state |= _entries(part.prefixes[0], layers)
        if part.ensemble:
            state |= _bookkeeping(part.prefixes[0], config.num_q)
        if part.ours == "value.online":
            state |= _entries("_detach_Qs_params.", layers) | _bookkeeping("_detach_Qs_params.", config.num_q)
    if current:
        state["log_std_min"] = torch.tensor(LOG_STD_MIN)
        state["log_std_dif"] = torch.tensor(LOG_STD_MAX - LOG_STD_MIN)
    with atomic_write(path) as file:
        torch.save({"model": {key: _own(value) for key, value in state.items()}}, file)


def _on_raw_observations(layer: Layer, normalizer: Normalizer) -> Layer:
    """Make W (o - m) / s + b a layer of o itself: weight W / s and bias b - W m / s."""
    weight = layer.weight / normalizer.deviation()
    return layer._replace(weight=weight, bias=layer.bias - weight @ normalizer.mean)


def _own(value: Any) -> Any:
    return value.cpu().contiguous() if isinstance(value, Tensor) else value


def _has(world_model: WorldModel, part: _Part) -> bool:
    """Tell whether the model has a part; a termination head that never saw an episode terminate does not count."""
    if part.ours == "termination_head":
        return world_model.predicts_termination
    return getattr(world_model, part.ours.partition(".")[0]) is not None


def _entries(prefix: str, layers: Sequence[Layer]) -> dict[str, Tensor]:
    names = {"weight": "weight", "bias": "bias", "scale": "ln.weight", "shift": "ln.bias"}
    tensors = {(i, key): getattr(layer, field) for i, layer in enumerate(layers) for field, key in names.items()}
    return {f"{prefix}{i}.{key}": value for (i, key), value in tensors.items() if value is not None}


def _flat_entries(prefix: str, layers: Sequence[Layer]) -> dict[str, Tensor]:
    return {f"{prefix}{n}": value for n, value in enumerate(_entries("", layers).values())}


def _bookkeeping(prefix: str, num_q: int) -> dict[str, Any]:
    """Make what tensordict, which TD-MPC2 keeps its values in, saves beside them."""
    return {f"{prefix}__batch_size": torch.Size([num_q]), f"{prefix}__device": None}
