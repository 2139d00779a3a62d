"""The picture a denoiser is heading for: one-step predictions, and latents to pixels."""

from __future__ import annotations

from torch import Tensor

from ..errors import HostError
from .run import Run

__all__ = ["clean_latents", "pixels"]


def clean_latents(run: Run, sample: Tensor, output: Tensor) -> Tensor:
    """Return the clean latents that a denoiser output stands for, x_0 given x_t.

    Flow matching: x_t - sigma v. Noise prediction: (x_t - sqrt(1 - a) e) / sqrt(a). Velocity
    (Salimans and Ho, 2022): sqrt(a) x_t - sqrt(1 - a) v. Sample prediction: the output.

    Args:
        run: the run; its scheduler says which, and how noisy x_t is.
        sample: the denoiser's input x_t [n, ...], as the scheduler scaled it.
        output: its guided output [n, ...].

    Raises:
        HostError: without a scheduler, or with an unknown kind of prediction.
    """
    scheduler = run.scheduler
    if scheduler is None:
        raise HostError("a one-step prediction needs the pipeline's scheduler; patch the pipeline")
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction")
    sigma = run.step(None).sigma
    if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
        return sample - sigma * output
    signal = 1 / (1 + sigma * sigma) ** 0.5  # sqrt(a); inputs are variance preserving here
    noise = sigma * signal
    if kind == "epsilon":
        return (sample - noise * output) / signal
    if kind == "v_prediction":
        return signal * sample - noise * output
    if kind == "sample":
        return output
    raise HostError(f"{type(scheduler).__name__} predicts {kind!r}, which attnctl does not know")


def pixels(run: Run, latents: Tensor) -> Tensor:
    """Decode latents of a pipeline with an image autoencoder; gradients flow.

    Args:
        run: the run.
        latents: [n, C, h, w], or packed tokens [n, N, D] where the pipeline unpacks them.

    Returns:
        RGB [n, 3, H, W] in 0 to 1.

    Raises:
        HostError: if the pipeline has no autoencoder, or its latents are no pictures.
    """
    pipe = run.pipe
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise HostError(f"{type(pipe).__name__} has no autoencoder to decode with")
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):
        size = (
            run.args.get(k) or pipe.default_sample_size * pipe.vae_scale_factor
            for k in ("height", "width")
        )
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if latents.ndim != 4:
        raise HostError(f"latents of shape {tuple(latents.shape)} are no pictures")
    scaled = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
