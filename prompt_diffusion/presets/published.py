"""The published configuration, each value with its source."""

from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import IngestConfig
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.evaluation.config import EvaluateConfig
from prompt_diffusion.presets.config import BaselinesConfig, Resources, RunConfig
from prompt_diffusion.training.config import SamplingConfig, TrainConfig
from prompt_diffusion.training.encode import EncodeConfig


def paper() -> RunConfig:
    """Return the published configuration (Wang et al., NeurIPS 2023, arXiv 2305.01115), each value with its source.

    "The code" is the authors' repository, Zhendong-Wang/Prompt-Diffusion at 8ecd2d1.

    - Data: CLIP-filtered InstructPix2Pix, 313,010 prompt groups, 90/5/5 in source order, 256 px by Lanczos, no augmentation
      (the code).
    - Maps: MiDaS dpt_hybrid, HED (BSDS500), segmentation in ADE20K colours (section 4), of the images at their own
      resolution, resized once by Lanczos (the code). The published segmentation network, UniFormer, is in no maintained
      package: UperNet takes its place, on the same classes and colours.
    - Model: SD v1.5; the ControlNet a copy of its encoder (section 3.2); stems of 16, 16, 32, 32, 96, 96, 256 channels, images
      in [-1, 1] (the code); ControlNet and SD's decoder trained (the code: the flag that should lock the decoder is inverted).
    - Samples: vision tasks and prompt groups drawn uniformly, then a pair of the group (the code: ``train.draw``); the example
      from the input image of the same prompt group, query and target from the edited image; the edited caption, or "depth
      map", "hed map", "segmentation map" (the code).
    - Dropout: one uniform number; text 0.10, example pair 0.10, both 0.05 (the code).
    - Loss: noise prediction, L2, all samples alike, timesteps uniform over SD's own 1000 steps (the code).
    - Optimizer: AdamW 1e-4, constant, not clipped, no EMA (the code; its decay and betas are presumed to be torch's defaults);
      batch 512 (section 4; the author names 256 x 4 GPUs in an issue, the published yaml gives 2048), 5,000 steps (the released
      weights are of step 4,999, after "nearly 20 epochs": 18.2 at 1,024, 9.1 at 512). The seed is ours.
    - Precision: the recipe's one departure, so that one GPU trains it in hours, not days. Published is float32 throughout
      (the code), which ``train.precision=float32`` restores; here the networks compute in bfloat16 by autocast, while
      weights, optimizer and loss stay float32.
    - Baselines: CN(FT)'s schedule is not public. Ours: the same recipe with the query alone, one vision task each, batch 128,
      as many samples of it as the joint model sees, from SD's encoder; ``baselines.controlnets`` starts them from public
      ControlNets.
    - Evaluation: DDIM, 100 steps, eta 0, guidance 9, the published suffix and negative prompt, the example of the same prompt
      group, the first 10,000 prompt groups of the test split by one random pair each, per vision task (section 4 and the
      code). The in-context test is ours. The same steps and guidance are the model's own (``train.sampling``).
    - FID: clean-fid's. The authors' own has the network's resizing: ``evaluate.extractor=inception_legacy``.
    - Resources change no result: published is gradient checkpointing, which saves memory alone and is off here.
    """
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    training = TrainResources(loader_threads=8, checkpoint_every_seconds=300.0, validate_every_steps=500)
    return RunConfig(
        name="paper",
        ingest=IngestConfig(source=InstructPix2PixConfig(uri="data/instruct-pix2pix"), image_size=256),
        annotate=(
            AnnotateConfig(condition="depth", annotator="depth_midas", resolution="native"),
            AnnotateConfig(condition="hed", annotator="hed_bsds500", resolution="native"),
            AnnotateConfig(condition="seg", annotator="seg_upernet", resolution="native"),
        ),
        encode=EncodeConfig(base=base),
        train=TrainConfig(
            base=base,
            draw="group",
            precision="bfloat16",
            sampling=SamplingConfig(num_inference_steps=100, guidance_scale=9.0),
        ),
        baselines=BaselinesConfig(batch_size=128),
        evaluate=EvaluateConfig(draw="group", extractor="inception"),
        resources=Resources(train=training, baselines=training),
    )
