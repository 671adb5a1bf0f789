"""The subjects of ``python -m msda_plugin benchmark``, one module each, and what they share.

Subjects: ``op`` (the operator), ``layer``, ``backbone``, ``head``, ``model`` (before and after ``accelerate``),
``realtime`` (RT-DETR and D-FINE against transformers' models), ``detectors`` (short trainings), ``gpu`` (the operator
against other GPU implementations), ``onnxruntime`` (the operator's node in onnxruntime) and ``all`` (one report of
everything). Each has ``add_parser`` and ``run``; those that ``all`` includes also have ``conditions`` and
``comparisons``, which yields what ``run`` prints.

Shared:

- ``comparison``: the result types and their columns
- ``options``: the command-line options and the description of the machine
- ``timing``: median times
- ``fresh_process``: measurements in a new process, with its peak memory
- ``growth``: time against resolution, also for ``python -m msda_plugin complexity``
- ``report``, ``plots``: the Markdown and HTML report of ``all``
- ``mmcv_kernels``: mmcv's CUDA kernel, compiled for ``gpu``
"""
