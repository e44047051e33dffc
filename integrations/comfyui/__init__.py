"""lrq's nodes for ComfyUI; copy this folder to ``ComfyUI/custom_nodes/lrq`` and install lrq in ComfyUI's Python."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
