"""DeepSpeed's pipeline, cut where we say."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.runtime.pipe.module import PipelineModule


class StagedPipeline(PipelineModule):
    """A PipelineModule whose `partition_method` is the bounds themselves (`pipeline_cut.stage_bounds`).

    DeepSpeed 0.19.8 cuts by number of layers, by parameters (for which it builds the whole model on every
    rank), or by a type of layer that weighs 1 while all others weigh 0.  None of them knows that the head is
    work, and its table of weights cannot be given, so this one method of it is replaced.
    """

    def _partition_layers(self, method: Sequence[int]) -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = list(method)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
