# Train with: docker run --gpus all --ipc host -v $PWD/runs:/home/trainer/megatron_tokenformer/runs IMAGE make demo
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make openssh-client pdsh python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1001 trainer
USER trainer
WORKDIR /home/trainer/megatron_tokenformer

COPY --chown=trainer pyproject.toml requirements.txt requirements-dev.txt Makefile README.md ./
COPY --chown=trainer megatron_tokenformer megatron_tokenformer
RUN make install
COPY --chown=trainer . .
ENV PATH=/home/trainer/megatron_tokenformer/.venv/bin:$PATH
CMD ["make", "demo"]
