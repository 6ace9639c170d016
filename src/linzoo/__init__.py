"""Linear-complexity vision backbones: `linzoo.ops`, `linzoo.backbones`, `linzoo.configs` and `linzoo.tools`.

``import linzoo.backbones`` registers every model with timm.
"""

__version__ = "0.1.0"
