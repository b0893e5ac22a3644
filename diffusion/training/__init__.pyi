from .compilation import what_compilation_lacks as what_compilation_lacks
from .distributed import (
    World as World,
    default_device as default_device,
    join as join,
    leave as leave,
    reshard as reshard,
    shard as shard,
)
from .launch import (
    become_torchrun as become_torchrun,
    check_gpus as check_gpus,
    is_first as is_first,
    is_worker as is_worker,
    train_on_ray as train_on_ray,
)
from .loop import (
    LoopConfig as LoopConfig,
    Terms as Terms,
    Trainer as Trainer,
    TrainSummary as TrainSummary,
    Watch as Watch,
)
from .optimiser import build_adamw as build_adamw
from .regional import compile_blocks as compile_blocks
from .resources import (
    count_forward as count_forward,
    estimate_step as estimate_step,
    memory_present as memory_present,
    remedies as remedies,
)
from .selftest import SelfTest as SelfTest
from .throughput import Progress as Progress, measured_matmul_rate as measured_matmul_rate
from .train import latent_loss as latent_loss, open_streams as open_streams, train as train
from .validation import OF_LATENTS as OF_LATENTS
