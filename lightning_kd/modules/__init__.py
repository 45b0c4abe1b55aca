"""The paradigms, each a LightningModule."""

from lightning_kd.modules.base import Distiller
from lightning_kd.modules.checkpoint_io import DurableCheckpointIO
from lightning_kd.modules.data_free import DataFree
from lightning_kd.modules.multi_teacher import MultiTeacher
from lightning_kd.modules.peer_cohort import PeerCohort
from lightning_kd.modules.sub_teacher import SubTeacher
from lightning_kd.modules.supervised import Supervised

__all__ = [
    "DataFree",
    "Distiller",
    "DurableCheckpointIO",
    "MultiTeacher",
    "PeerCohort",
    "SubTeacher",
    "Supervised",
]
