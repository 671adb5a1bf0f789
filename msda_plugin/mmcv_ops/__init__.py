"""mmcv's operators without compiling mmcv.

``extension`` holds what mmcv's Python calls; :func:`install` lets mmcv find it, :func:`remove` undoes that, and
:func:`status` tells what runs for each operator.
"""

from msda_plugin.mmcv_ops.installation import DISTRIBUTIONS, INSTALL, Installation, Row, find, install, remove, status

__all__ = ['DISTRIBUTIONS', 'INSTALL', 'Installation', 'Row', 'find', 'install', 'remove', 'status']
