"""Names that users write, such as solvers and dtypes. The command line needs them without torch."""

AUTO = "auto"  # the device, dtype or precision that suits the machine

SOLVERS = ("ddim", "ddpm", "dpmsolver", "dpmsolver++", "unipc")
DEFAULT_STEPS = 50  # of ddim, where a model names no others
BASE_PATHS = ("stepwise", "clean")  # by the base network's estimates, or by the finished base frame
OUTPUT_TYPES = ("np", "pt", "pil")  # formats of a pipeline's frames
TEXT_OUTPUT_TYPES = (*OUTPUT_TYPES, "latent")  # and those of a text-to-video pipeline's
FILTERS = ("nearest", "lanczos")  # for enlarging frames
CODECS = ("h264", "hevc", "av1", "vp9", "ffv1")  # of video files; PyAV may lack some
CHROMAS = ("420", "444")  # colours at a quarter of the pixels, or at each
OBJECTIVES = ("decomposed", "vdm")  # kinds of models; "vdm" is plain video diffusion
# and of the parts of models on latents; "distill" makes few steps of a model's many
TRAININGS = (*OBJECTIVES, "autoencoder", "text", "distill")
STUDENT_STEPS = (1, 2, 4, 8, 16)  # that a network can be distilled to
PRECISIONS = ("bf16", "fp32")  # of training
NETWORKS_TRAINED = ("both", "base", "residual")  # of a decomposed model

# dtypes of networks: what users may write, and the name in torch
DTYPE_NAMES = {
    **{name: name for name in (AUTO, "float32", "bfloat16", "float16")},
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
