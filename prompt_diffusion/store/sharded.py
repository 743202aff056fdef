"""The one engine of every sharded stage: nothing is done twice, a killed run resumes, the bytes are the same."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.store.codec import METADATA_KEY, open_parquet
from prompt_diffusion.store.concurrency import map_ahead
from prompt_diffusion.store.fingerprint import StageIdentity, write_canonical_json
from prompt_diffusion.store.records import MadeShard, ManifestRef, OnProgress, Reject, ShardProgress
from prompt_diffusion.store.sealing import describe_file, seal_manifest
from prompt_diffusion.store.storage import create_bytes, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)

ShardRows = tuple[pa.Table, list[Reject]]
MakeShard = Callable[[int], ShardRows]
"""Makes one shard: its rows, and the samples that it leaves out."""

_ROW_GROUP_ROWS = 64  # small, so that reading one row at random costs little
_WRITER = f"parquet-cpp-arrow version {pa.cpp_version}"


def run_sharded_stage(
    identity: StageIdentity,
    store_root: str,
    num_shards: int,
    make_shard: MakeShard,
    *,
    made: Iterable[MadeShard] = (),
    num_at_once: int = 1,
    reject_budget: float = 0.01,
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Make the shards of a stage that are missing, seal, and return the reference.

    ``make_shard(index)`` must depend on the identity and the index alone; ``num_at_once`` threads call it. ``made`` are
    shards that ``make_shards`` reported elsewhere: they are not read again, only their sizes are checked before sealing.
    ValueError, before sealing, if more than ``reject_budget`` of all samples were rejected; shards with rejects that an
    earlier run left are first made again.
    """
    if num_shards < 1:
        raise ValueError(f"stage {identity.stage} has {num_shards} shards to make: there is nothing to do")
    known = {shard.index: shard for shard in made}
    fresh = set(known)

    def make_fresh(index: int) -> ShardRows:
        fresh.add(index)
        return make_shard(index)

    def make_some(indices: Sequence[int], *, reuse: bool) -> None:
        shards = make_shards(
            identity,
            store_root,
            num_shards,
            make_fresh,
            indices,
            num_at_once=num_at_once,
            on_progress=on_progress,
            reuse=reuse,
        )
        known.update((shard.index, shard) for shard in shards)

    make_some([index for index in range(num_shards) if index not in known], reuse=True)
    if _is_over_budget(known.values(), reject_budget):
        # What an earlier run rejected may have been repaired since.
        make_some([index for index, shard in known.items() if shard.rejects and index not in fresh], reuse=False)
    shards = sorted(known.values(), key=lambda shard: shard.index)
    rejects = [reject for shard in shards for reject in shard.rejects]
    num_rows = sum(shard.file.rows for shard in shards)
    if _is_over_budget(shards, reject_budget):
        raise ValueError(_describe_rejects(identity, num_rows, rejects, reject_budget))
    counts = {"rows": num_rows, "rejects": len(rejects)}
    return seal_manifest(identity, store_root, [shard.file for shard in shards], counts=counts, rejects=rejects)


def make_shards(
    identity: StageIdentity,
    store_root: str,
    num_shards: int,
    make_shard: MakeShard,
    indices: Sequence[int],
    *,
    num_at_once: int = 1,
    on_progress: OnProgress | None = None,
    reuse: bool = True,
) -> list[MadeShard]:
    """Find or make some of a stage's shards, and seal nothing: what one of many workers does; progress counts that part alone.

    Without ``reuse``, shards that an earlier run left are made again.
    """

    def find_or_make(index: int) -> MadeShard:
        return _find_or_make_shard(identity, store_root, index, num_shards, make_shard, reuse=reuse)

    shards: list[MadeShard] = []
    num_rows = num_rejects = 0
    pool = ThreadPoolExecutor(num_at_once, thread_name_prefix="shard")
    try:
        # A single shard is made in this thread, which an interrupt reaches.
        found = map(find_or_make, indices) if num_at_once == 1 else map_ahead(pool, find_or_make, indices, num_at_once)
        for shard in found:
            shards.append(shard)
            num_rows += shard.file.rows
            num_rejects += len(shard.rejects)
            if on_progress is not None:
                on_progress(ShardProgress(len(shards), len(indices), num_rows, num_rejects))
    finally:
        # Not waited for: after an error, the caller closes what `make_shard` uses, and so ends it.
        pool.shutdown(wait=False, cancel_futures=True)
    return shards


def refuse_to_make(index: int) -> ShardRows:
    """Stand in for the maker of a stage whose shards were all reported as made."""
    raise AssertionError(f"shard {index} was reported as made")


def name_shard(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.parquet"


def encode_shard(table: pa.Table) -> bytes:
    """Return the Parquet bytes of a table: a function of its rows and schema alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),  # page borders would follow the chunks
        sink,
        row_group_size=_ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
    )
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def _find_or_make_shard(
    identity: StageIdentity,
    store_root: str,
    index: int,
    num_shards: int,
    make_shard: MakeShard,
    *,
    reuse: bool,
) -> MadeShard:
    """Return the shard that an earlier run left, if it may be reused, or make it."""
    name = name_shard(index)
    uri = join_uri(identity.uri(store_root), name)
    header: dict[str, str | int] = {"fingerprint": identity.fingerprint, "shard": index, "num_shards": num_shards}
    left, is_to_be_replaced = _read_leftover(uri, index, header) if reuse else (None, True)
    if left is not None:
        return left
    table, rejects = make_shard(index)
    content = {**header, "rejects": [reject.model_dump() for reject in rejects]}
    metadata = {**(table.schema.metadata or {}), METADATA_KEY: write_canonical_json(content).encode()}
    data = encode_shard(table.replace_schema_metadata(metadata))
    if is_to_be_replaced:
        write_bytes(uri, data)
    elif not create_bytes(uri, data):
        # Another run made it meanwhile, and may be about to seal it: what is there counts, not ours.
        left, _ = _read_leftover(uri, index, header)
        if left is not None:
            return left
        write_bytes(uri, data)
    return MadeShard(index=index, file=describe_file(name, data, table.num_rows), rejects=tuple(rejects))


def _read_leftover(uri: str, index: int, header: dict[str, str | int]) -> tuple[MadeShard | None, bool]:
    """Return the whole shard of this identity that is there, if any, and whether something else is in its place."""
    try:
        data = read_bytes(uri)
    except FileNotFoundError:
        return None, False
    try:
        file = open_parquet(data, page_checksum_verification=True)
        content = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])
        if {key: content[key] for key in header} != header:
            raise ValueError(f"it belongs to shard {content['shard']} of {content['num_shards']}")
        rejects = tuple(Reject.model_validate(reject) for reject in content["rejects"])
        table = file.read()
        # Page checksums leave headers and footer out; our own writer can vouch for every byte, another version cannot.
        if file.metadata.created_by == _WRITER and encode_shard(table) != data:
            raise ValueError("its bytes are not those that its rows give")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("%s was left behind and cannot be used (%s): made again", uri, reason)
        return None, True
    return MadeShard(index=index, file=describe_file(name_shard(index), data, table.num_rows), rejects=rejects), False


def _is_over_budget(shards: Collection[MadeShard], budget: float) -> bool:
    """Say whether more than the budgeted share of the samples was rejected."""
    num_rejects = sum(len(shard.rejects) for shard in shards)
    return num_rejects > budget * (num_rejects + sum(shard.file.rows for shard in shards))


def _describe_rejects(identity: StageIdentity, num_rows: int, rejects: Sequence[Reject], budget: float) -> str:
    examples = "; ".join(f"{reject.sample_id}: {reject.reason}" for reject in rejects[:3])
    return (
        f"stage {identity.stage} rejected {len(rejects)} of {num_rows + len(rejects)} samples, more than the budget of "
        f"{budget:.2%}: {examples}"
    )
