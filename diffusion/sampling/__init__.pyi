from .interpolator import Interpolator as Interpolator, change_gain as change_gain
from .monai_bundle import BundleFacts as BundleFacts, export_bundle as export_bundle
from .plan import (
    SampleSettings as SampleSettings,
    SampleTask as SampleTask,
    generation_key as generation_key,
    open_generated as open_generated,
    plan_samples as plan_samples,
)
from .stage import (
    PreparedSample as PreparedSample,
    SampleWorker as SampleWorker,
    draw as draw,
    generate_for as generate_for,
    prepare as prepare,
    set_up as set_up,
)
