"""Read the headers of a source's members, inflating no more of each than its header needs."""

from __future__ import annotations

from collections.abc import Sequence

from latentcache import InputError
from pipeline.archive import Source, StorageError, nested_archive
from pipeline.reading.header import NeedMoreError, NotDicomError, parse_header
from pipeline.reading.instance import MULTIFRAME_CLASSES, Instance, instance_of
from pipeline.reading.public_attributes import identity_facts, public_facts
from pipeline.volume import SourceHeader

HEAD_BYTES = 4096
_HEAD_GROWTH = 16
_MAX_HEAD_BYTES = 64 << 20


def read_instances(
    source: Source,
    problems: list[tuple[int, str]],
    ignored: list[tuple[int, str]],
    only: frozenset[int] | None = None,
) -> list[Instance]:
    """Parse the heads of all members, or of ``only`` some, reading more of those whose header is long."""
    members = {m.index: m for m in source.members() if only is None or m.index in only}
    pending, limit = list(members), HEAD_BYTES
    found: list[Instance] = []
    while pending:
        longer: list[int] = []
        for index, head in source.heads(pending, limit):
            if isinstance(head, InputError):
                problems.append((index, head.found))
                continue
            member = members[index]
            try:
                header = parse_header(head, whole=len(head) >= member.size)
                one = instance_of(header, index, member.size, member.crc32)
                if one.sop_class in MULTIFRAME_CLASSES:
                    from pipeline.reading.enhanced_ct import frames_of

                    found.extend(frames_of(one, source.read(index)))
                else:
                    found.append(one)
            except NotDicomError as error:
                nested = nested_archive(member.name, head, in_zip=member.crc32 is not None)
                (problems if nested else ignored).append((index, nested or error.found))
            except NeedMoreError:
                longer.append(index)
            except StorageError:
                raise
            except InputError as error:
                problems.append((index, error.found))
        pending, limit = longer, limit * _HEAD_GROWTH
        if pending and limit > _MAX_HEAD_BYTES:
            problems.extend((index, "a header of more than 64 MiB") for index in pending)
            break
    return found


def source_header(instances: Sequence[Instance]) -> SourceHeader:
    """Public facts and private identity of a series, from its first slice."""
    header = instances[0].header
    uids = tuple(one.sop_uid for one in instances)
    return SourceHeader(public=public_facts(header), identity=identity_facts(header), sop_instance_uids=uids)
