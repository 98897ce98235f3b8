"""`blip2-search train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, render

if TYPE_CHECKING:
    from ..retrieval.training_data import CaptionFile
    from ..retrieval.training_run import RunReport


def train(
    *,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name from the list above, or a .toml file.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE",
            help="Captions: Karpathy .json, .csv, .tsv, .parquet, labels .json, or .tar shards. "
            "Several are trained on together; next to shards, others give the validation split only.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="The folder that the paths in FILE are relative to; one for each FILE.  "
            "[default: the file's own folder]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The folder of the run.  [default: runs/RECIPE]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="TABLE.KEY=VALUE", help="Change the recipe, as train.batch_size=64."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Where a frozen encoder's tokens are kept.  [default: your cache directory]",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard too, in DIR/tensorboard.")
    ] = False,
    device: options.DeviceOption = "auto",
    verbose: options.VerboseOption = False,
) -> None:
    """Train a retrieval model, or fine-tune one, on captioned images.

    Needs the extra: pip install "blip2-search[train]". Ctrl-C writes a checkpoint. The best model by
    recall in validation is DIR/best; curves.png and log.jsonl tell how it went. Images that cannot be
    read are skipped and counted.

    A batch (train.batch_size) is what ITC contrasts, over all GPUs together. train.accumulate adds up
    the gradients of several batches for an update: it does not enlarge what ITC contrasts.

    Recipes:
      mini                  the default model, from ImageNet and MiniLM weights; an hour on a laptop
      mini-finetune         its second part: the image encoder is trained too
      mini-queries          its query half anew, by ITC alone: finds more, without rerank
      pretrain-vit-l        BLIP-2's stage 1, as published
      pretrain-vit-g
      finetune-coco-vit-g   BLIP-2's retrieval fine-tuning on COCO, as published

    Examples:
      blip2-search train mini --data flickr8k/dataset_flickr8k.json --images flickr8k/images
      blip2-search train mini-finetune --data my.csv --images ~/Pictures --out runs/mine
      blip2-search train mini --data my.csv --set train.batch_size=64 --set data.views=2
      torchrun --nproc-per-node 8 --no-python blip2-search train pretrain-vit-g --data 'cc3m-{000..331}.tar'
      blip2-search index ~/Pictures --model runs/mine/best
    """
    from ..retrieval.recipe import read_recipe
    from ..retrieval.training_run import run_recipe
    from .training_progress import TrainingProgress

    chosen = read_recipe(recipe, changes or [])
    folder = out or Path("runs") / chosen.name
    try:
        with TrainingProgress() as progress:
            report = run_recipe(
                chosen,
                _caption_files(data, images or []),
                folder,
                cache=cache or options.default_cache(),
                resume=resume,
                device=device,
                tensorboard=tensorboard,
                observers=(progress.observe,),
                prepare=progress.prepare,
            )
    except KeyboardInterrupt:
        again = "with --resume goes on from the last checkpoint"
        if not (folder / "recipe.json").exists():
            again = "goes on with what was encoded"
        render.say(f"Interrupted. The same command {again}.")
        raise typer.Exit(130) from None
    if report is not None:
        _summarise(report, len(progress.skipped))


def _caption_files(data: list[str], images: list[Path]) -> list[CaptionFile]:
    from ..retrieval.training_data import CaptionFile

    if images and len(images) != len(data):
        raise typer.BadParameter("give one --images for each --data", param_hint="--images")
    folders = images or [Path(file).parent for file in data]
    return [
        CaptionFile(file=file, images=folder) for file, folder in zip(data, folders, strict=True)
    ]


def _summarise(report: RunReport, skipped: int) -> None:
    before = f" after {report.resumed_at:,} before" if report.resumed_at else ""
    render.say(f"{report.steps:,} updates{before} in {render.duration(report.seconds)}")
    if skipped:
        render.say(f"{render.images(skipped)} could not be read and were skipped (see log.jsonl)")
    if report.best_recall is None:
        render.say("There was nothing to validate with: the last model is kept.")
    else:
        render.say(f"best mean recall in validation (ITC alone): {report.best_recall:.1f} %")
    render.say(f"curves: {render.short_path(str(report.curves))}")
    render.say(f"Next: blip2-search index ./photos --model {render.short_path(str(report.model))}")
