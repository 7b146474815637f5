"""A synthetic drive in KITTI object layout, generated on the machine: streets seen by a camera and a 64-beam LiDAR.

`shapes` and `appearance` are what a `street` is made of; it casts `rays` for `sensors`, `frame` adds labels, `writer`
writes folders.
"""

from .frame import SyntheticFrame, synthesize_frame
from .sensors import Calibration, Lidar
from .writer import synthesize_drive

__all__ = ["Calibration", "Lidar", "SyntheticFrame", "synthesize_drive", "synthesize_frame"]
