from .rows import Frame as Frame
