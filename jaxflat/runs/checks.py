"""Check before training that a config fits its language, its model and the devices.

Every check raises ValueError with one line that names the key.
"""

from collections.abc import Iterable

from jaxflat.config import Config, functions
from jaxflat.flatness.measures import TRACES
from jaxflat.flatness.terms import MIN_SAMPLES
from jaxflat.runs import builders, trajectory
from jaxflat.runs.function_checks import check_functions
from jaxflat.runs.languages import has_labels, language_kind

FIXED_LABEL_MEASURES = (
    *("average_sharpness", "adaptive_average_sharpness"),
    *("worst_sharpness", "adaptive_worst_sharpness", "critical_sharpness"),
    *("gradient_noise", "local_learning_coefficient"),
    *("loss_slices", "loss_plane", "loss_path"),
)
"""Measures that use the gradient, or the loss away from the checkpoint: they need fixed labels."""

SHARPNESS_MEASURES = {"hessian_eigenvalues": "hessian_eigenvalue/largest_1"} | {
    name: name
    for name in (
        *TRACES,
        *("average_sharpness", "adaptive_average_sharpness"),
        *("worst_sharpness", "adaptive_worst_sharpness", "critical_sharpness"),
        "local_learning_coefficient",
    )
}
"""For each measure of sharpness, the column that verdicts compare."""


def check_config(config: Config) -> None:
    """Raise ValueError if a valid config cannot run with its language, model and devices."""
    check_functions(config)
    language_kind(config.language).check_uses(config)
    if config.language.masking != "one" and config.evaluation.num_positions:
        raise ValueError("evaluation.num_positions is for language.masking='one'; set it to 0")
    _check_masking(config)
    num_devices = builders.make_mesh(config).size
    for key, size in builders.batch_sizes(config).items():
        if size % num_devices:
            raise ValueError(
                f"{key}={size} is not divisible by the {num_devices} devices of mesh.data times "
                "mesh.model"
            )
    if config.evaluation.num_sentences % config.evaluation.batch_size:
        raise ValueError(
            f"evaluation.batch_size={config.evaluation.batch_size} does not divide "
            f"evaluation.num_sentences={config.evaluation.num_sentences}"
        )
    check_finetuning(config.probes.finetune)
    trained = config.model.name != "lookup_table"
    if config.probes.finetune.pooling == "cls" and trained and not config.model.cls:
        raise ValueError("probes.finetune.pooling='cls' needs a transformer with model.cls=True")
    check_flatness(config.flatness)
    check_rounds(config.flatness)
    width = config.flatness.embedded_width
    if width and config.model.name in functions.sections_in(config.model):
        raise ValueError(
            f"flatness.embedded_width={width} must be 0 for model.name={config.model.name!r}: how "
            "a user's model embeds in a larger one is not known"
        )
    if config.model.name in functions.sections_in(config.model):
        _check_training_of_own_model(config)
    if config.phase_order and width % config.model.width:
        raise ValueError(
            f"flatness.embedded_width={width} is not a multiple of model.width={config.model.width}"
        )
    layers = config.flatness.embedded_layers
    if config.phase_order and 0 < layers < config.model.num_layers:
        raise ValueError(
            f"flatness.embedded_layers={layers} is less than model.num_layers="
            f"{config.model.num_layers}"
        )
    for name in config.phase_order:
        phase, key = config.phases[name], f"phases.{name}"
        if phase.rescaling and config.model.name in functions.sections_in(config.model):
            raise ValueError(
                f"{key}.rescaling={phase.rescaling} must be 0.0 for model.name="
                f"{config.model.name!r}: the rescalings of a user's model are not known"
            )
        for step in set(phase.projection.checkpoint_steps) - set(phase.checkpoint_steps):
            raise ValueError(
                f"{key}.projection.checkpoint_steps: {step} is not one of "
                f"{key}.checkpoint_steps={phase.checkpoint_steps}"
            )
    steps = [s.step for s in trajectory.measured_checkpoints(config) if not s.projected]
    if len(set(steps)) < len(steps):
        raise ValueError(
            f"phases.*.checkpoint_steps: two checkpoints end at the same step of {sorted(steps)}"
        )


def _check_masking(config: Config) -> None:
    """Raise ValueError if the model predicts other words than those that the language hides."""
    masking, name = config.language.masking, config.model.name
    if not builders.is_ours(config) or name == "lookup_table":
        return
    if name == "causal" and masking != "causal":
        raise ValueError(
            f"language.masking={masking!r} must be 'causal' for model.name='causal', which "
            "predicts each next word from those before it"
        )
    if name != "causal" and masking == "causal":
        raise ValueError(
            f"model.name={name!r} must be 'causal' for language.masking='causal': it would see the "
            "words that it predicts"
        )


def _check_training_of_own_model(config: Config) -> None:
    for key, default in (("remat", False), ("compute_dtype", "float32")):
        if config.training[key] != default:
            raise ValueError(
                f"training.{key}={config.training[key]!r} must be {default!r} for model.name="
                f"{config.model.name!r}: a user's model decides this itself"
            )


def check_claims(config: Config) -> None:
    """Raise ValueError if the accuracy or the flatness that the claims rest on is not measured."""
    claims, probes, flatness = config.claims, config.probes, config.flatness
    on_accuracy = claims.primary in ("accuracy", "effect")
    if on_accuracy and config.phase_order and not has_labels(config.language):
        raise ValueError(
            f"claims.primary={claims.primary!r} needs labels, and language.name="
            f"{config.language.name!r} has none; set claims.primary='flatness'"
        )
    if claims.shots and claims.shots not in probes.shots:
        raise ValueError(f"claims.shots={claims.shots} is not one of probes.shots={probes.shots}")
    if claims.probe == "linear_probe_projected" and not probes.projected_dimension:
        raise ValueError(
            f"claims.probe={claims.probe!r} needs probes.projected_dimension; set it, for example "
            "to 128"
        )
    if claims.primary != "accuracy" and config.phase_order and not sharpness_columns(flatness):
        raise ValueError(
            f"claims.primary={claims.primary!r} needs a measure of sharpness, such as "
            f"hessian_trace; flatness.measures={flatness.measures} has none"
        )


def sharpness_columns(settings: Config) -> list[str]:
    """Return the columns of sharpness that are measured; a user's own measures are not among them.

    The largest eigenvalue needs eigenvalues.num_largest.
    """
    return [
        column
        for measure, column in SHARPNESS_MEASURES.items()
        if measure in settings.measures
        and (measure != "hessian_eigenvalues" or settings.eigenvalues.num_largest)
    ]


def check_finetuning(settings: Config) -> None:
    """Raise ValueError if fine-tuning is requested with too few steps."""
    if not settings.shots:
        return
    num_seen = settings.epochs * settings.shots
    if settings.batch_size > num_seen:
        raise ValueError(
            f"probes.finetune.batch_size={settings.batch_size} exceeds epochs * shots = {num_seen}"
        )
    num_steps = num_seen // settings.batch_size
    if settings.warmup_steps >= num_steps:
        raise ValueError(
            f"probes.finetune.warmup_steps={settings.warmup_steps} must be less than the "
            f"{num_steps} steps that epochs * shots // batch_size makes"
        )


def check_flatness(settings: Config) -> None:
    """Raise ValueError if a requested measure is impossible with these settings."""
    check_labels(settings.labels, settings.measures)
    chosen = settings.eigenvalues
    num_pairs = chosen.num_largest + chosen.num_smallest
    if "hessian_eigenvalues" in settings.measures and num_pairs > chosen.num_steps:
        raise ValueError(
            f"flatness.eigenvalues.num_steps={chosen.num_steps} is less than num_largest + "
            f"num_smallest = {num_pairs}"
        )
    if "gradient_noise" in settings.measures and settings.num_microbatches < 6:
        raise ValueError(
            f"flatness.num_microbatches={settings.num_microbatches} must be at least 6 for "
            "gradient_noise, two triples: --config.flatness.num_microbatches=6"
        )
    for name in ("num_points", "plane_points"):
        if (number := settings.slices[name]) < 2:
            raise ValueError(f"flatness.slices.{name}={number} must be at least 2: both ends")


def check_rounds(settings: Config) -> None:
    """Raise ValueError if max_rounds gives fewer samples than the stopping rule of traces needs."""
    most = settings.max_rounds * settings.num_microbatches
    if settings.relative_error > 0 and most < MIN_SAMPLES:
        raise ValueError(
            f"flatness.relative_error={settings.relative_error} takes {MIN_SAMPLES} samples or "
            f"more; max_rounds={settings.max_rounds} of num_microbatches="
            f"{settings.num_microbatches} make {most}"
        )


def check_labels(labels: str, measures: Iterable[str]) -> None:
    """Raise ValueError if a measure has no meaning with labels="model".

    With labels that follow the model, the gradient is 0, and the labels differ between parameters.
    """
    for measure in measures:
        if labels == "model" and measure in FIXED_LABEL_MEASURES:
            raise ValueError(
                f"flatness.labels='model' leaves {measure} without meaning; use it only for "
                "traces, eigenvalues and the density"
            )
