"""A contact sheet of an annotation: each row's edited image beside its condition maps."""

from collections.abc import Mapping

from prompt_diffusion.store.contact_sheet import draw_contact_sheet
from prompt_diffusion.store.manifest import ManifestRef, open_manifest


def render_maps_sheet(pairs: ManifestRef, maps: Mapping[str, ManifestRef], max_rows: int = 6) -> bytes:
    """Return a PNG of the first rows of the first shard: the edited image, then its map of each condition."""
    source = open_manifest(pairs.uri)
    columns = ["sample_id", "edited_prompt", "edited_image"]
    rows = source.read_shard(source.shards[0], columns).slice(0, max_rows).to_pylist()
    cells: list[dict[str, bytes | None]] = [{"image": row["edited_image"]["bytes"]} for row in rows]
    for condition, ref in maps.items():
        manifest = open_manifest(ref.uri)
        table = manifest.read_shard(manifest.shards[0], ["edited_map"]).slice(0, max_rows)
        for row, value in zip(cells, table["edited_map"].to_pylist(), strict=True):
            row[condition] = value["bytes"]
    title = f"condition maps of ingest {pairs.fingerprint}, rows 1 to {len(rows)} of {pairs.rows}"
    texts = [[row["sample_id"], row["edited_prompt"]] for row in rows]
    return draw_contact_sheet(title, ["image", *maps], cells, texts)
