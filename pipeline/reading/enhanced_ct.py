"""Frames of an enhanced CT image: position, orientation, spacing and rescale from the functional groups (C.7.6.16)."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import replace
from typing import Any

from latentcache import InputError
from pipeline.reading.header import HeaderError
from pipeline.reading.instance import (
    Instance,
    as_cosines,
    as_label,
    as_rescale_type,
    as_spacing,
    as_thickness,
    as_vector,
)

MAX_FRAMES = 20_000


def frames_of(one: Instance, data: bytes) -> list[Instance]:
    """Every frame of a multi-frame file as a separate instance. The slow, checked path: pydicom parses the file.

    Args:
        one: What the fast walk found; its pixel form and identity hold for all frames.
        data: The whole file.

    Raises:
        HeaderError: Functional groups missing, or not one for every frame.
    """
    from pydicom import dcmread

    if not 1 <= one.frames <= MAX_FRAMES:
        raise HeaderError(f"{one.frames} frames in a multi-frame image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about values that are judged below anyway
            dataset = dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
            shared = _first(dataset.get("SharedFunctionalGroupsSequence"))
            groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
            if len(groups) != one.frames:
                raise HeaderError(f"{len(groups)} functional groups for {one.frames} frames")
            return [_frame(one, number, shared, group) for number, group in enumerate(groups)]
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  pydicom raises whatever the damage happens to provoke
        raise HeaderError(f"a multi-frame header that cannot be parsed ({type(error).__name__})") from None


def _first(sequence: Any) -> Any:
    return sequence[0] if sequence else None


def _macro(keyword: str, group: Any, shared: Any) -> Any:
    """First item of a functional group macro: the frame's own, else the shared one."""
    for owner in (group, shared):
        item = _first(owner.get(keyword)) if owner is not None else None
        if item is not None:
            return item
    return {}


def _floats(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) or hasattr(value, "__iter__") else [value]
    return tuple(float(v) for v in values)


def _number(value: Any) -> float | None:
    numbers = _floats(value)
    return numbers[0] if numbers else None


def _frame(one: Instance, number: int, shared: Any, group: Any) -> Instance:
    measures = _macro("PixelMeasuresSequence", group, shared)
    transform = _macro("PixelValueTransformationSequence", group, shared)
    content = _macro("FrameContentSequence", group, shared)
    kind = _macro("CTImageFrameTypeSequence", group, shared)
    reconstruction = _macro("CTReconstructionSequence", group, shared)
    acquisition = _macro("CTAcquisitionDetailsSequence", group, shared)
    beam = _macro("CTXRayDetailsSequence", group, shared)
    phase = _macro("CardiacSynchronizationSequence", group, shared)
    thickness = _number(measures.get("SliceThickness"))
    image_type = tuple(str(part).upper() for part in kind.get("FrameType") or one.image_type)
    stack_id = str(content.get("StackID") or "")
    acquisition_number = str(content.get("FrameAcquisitionNumber") or one.acquisition)
    rescale_type = as_rescale_type(str(transform.get("RescaleType") or one.rescale_type))
    tilt = _number(acquisition.get("GantryDetectorTilt"))
    return replace(
        one,
        frame=number,
        image_type=image_type,
        position=as_vector(_floats(_macro("PlanePositionSequence", group, shared).get("ImagePositionPatient"))),
        orientation=as_cosines(
            _floats(_macro("PlaneOrientationSequence", group, shared).get("ImageOrientationPatient"))
        ),
        pixel_spacing=as_spacing(_floats(measures.get("PixelSpacing"))),
        thickness_mm=as_thickness(thickness),
        slope=_number(transform.get("RescaleSlope")),
        intercept=_number(transform.get("RescaleIntercept")),
        rescale_type=rescale_type,
        kernel="\\".join(str(k) for k in _as_list(reconstruction.get("ConvolutionKernel"))) or one.kernel,
        acquisition=acquisition_number,
        tilt_deg=tilt if tilt is not None and math.isfinite(tilt) else 0.0,
        labels={
            "acquisition": acquisition_number,
            "stack": stack_id,
            "kvp": str(beam.get("KVP") or ""),
            "type": "\\".join(image_type),
            "temporal-position": str(content.get("TemporalPositionIndex") or ""),
            "cardiac-phase": as_label(_number(phase.get("NominalPercentageOfCardiacPhase"))),
            "cardiac-delay": as_label(_number(phase.get("NominalCardiacTriggerDelayTime"))),
            "thickness": str(thickness),
            "acquisition-time": str(content.get("FrameAcquisitionDateTime") or ""),
        },
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__") else [value]
