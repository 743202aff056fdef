"""What a training reads: datasets with their latents and text embeddings, as references to sealed manifests; no torch."""

from collections.abc import Iterable, Iterator

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.store.fingerprint import StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.vision_tasks import VisionTask, find_vision_task

IMAGE_TARGET = "image"


class TrainInputs(Dataset):
    """A dataset with what the frozen networks made of it, and further datasets beside it."""

    latents: dict[str, ManifestRef]
    """Latents of the edited side, by target: ``image`` or a condition."""
    text: ManifestRef
    """Text embeddings of the pairs' edited captions."""
    others: tuple["TrainInputs", ...] = ()
    """Further datasets, each whole: a vision task is read from the first dataset that has its condition maps."""

    def list_roles(self) -> Iterator[StageInput]:
        """Yield everything that is read; the roles of further datasets begin with their number."""
        for position, dataset in enumerate(self.datasets):
            prefix = "" if position == 0 else f"dataset-{position + 1}/"
            yield StageInput.of(f"{prefix}pairs", dataset.pairs)
            yield StageInput.of(f"{prefix}text", dataset.text)
            for condition, ref in dataset.maps.items():
                yield StageInput.of(f"{prefix}maps/{condition}", ref)
            for target, ref in dataset.latents.items():
                yield StageInput.of(f"{prefix}latents/{target}", ref)

    @property
    def datasets(self) -> tuple["TrainInputs", ...]:
        """Every dataset alone, in order."""
        return (self.model_copy(update={"others": ()}), *self.others)

    def find_dataset(self, vision_task: str) -> int:
        """Return the position, in ``datasets``, of the one that a vision task is read from; ValueError where none has it."""
        condition = find_vision_task(vision_task).condition
        for position, dataset in enumerate(self.datasets):
            if condition in dataset.maps:
                return position
        there = ", ".join(name for dataset in self.datasets for name in dataset.maps)
        raise ValueError(
            f"vision task {vision_task!r} needs condition maps of {condition}; there are {there or 'none'}"
        )

    def narrow(self, vision_tasks: Iterable[str]) -> "TrainInputs":
        """Keep what those vision tasks read, of each dataset that one of them reads; ValueError names what is missing."""
        tasks: dict[int, list[VisionTask]] = {}
        for name in vision_tasks:
            tasks.setdefault(self.find_dataset(name), []).append(find_vision_task(name))
        first, *others = (self.datasets[position]._keep(tasks[position]) for position in sorted(tasks))
        return first.model_copy(update={"others": tuple(others)})

    def _keep(self, tasks: Iterable[VisionTask]) -> "TrainInputs":
        """Keep what vision tasks read of this one dataset, which has their condition maps."""
        maps = sorted({task.condition for task in tasks})
        latents = sorted({task.target_condition or IMAGE_TARGET for task in tasks})
        missing = [name for name in latents if name not in self.latents]
        if missing:
            raise ValueError(
                f"the vision tasks need latents of {', '.join(missing)}; there are {', '.join(self.latents) or 'none'}"
            )
        return TrainInputs(
            pairs=self.pairs,
            maps={name: self.maps[name] for name in maps},
            latents={name: self.latents[name] for name in latents},
            text=self.text,
        )


def check_pairs(pairs: ManifestRef) -> None:
    """Raise ValueError where image pairs are too few to train on: no validation row, or no second prompt group to show."""
    splits = open_manifest(pairs.uri).read_table(["split", "group_id"]).to_pydict()
    groups = {split: set[str]() for split in ("train", "validation")}
    for split, group in zip(splits["split"], splits["group_id"], strict=True):
        groups.get(split, set()).add(group)
    if len(groups["train"]) < 2 or not groups["validation"]:
        raise ValueError(
            f"{pairs.rows} pairs are too few: {len(groups['train'])} of their groups are for training, of which two are "
            f"needed, and {len(groups['validation'])} for validation, of which one is: give more pairs, or a larger share in "
            "ingest.split_fractions"
        )
