FROM python:3.13-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:3.13-slim
RUN --mount=type=bind,from=build,source=/wheel,target=/wheel \
    pip install --no-cache-dir /wheel/*.whl \
    && useradd --create-home audio
USER audio
ENV DAGSTER_HOME=/home/audio/home AUDIO_LIBRARY=/music
# The image also has what librosa compiles as it is first imported.
RUN audio-assets init $DAGSTER_HOME
WORKDIR $DAGSTER_HOME
VOLUME $DAGSTER_HOME
EXPOSE 3000
# docker run -p 127.0.0.1:3000:3000 -v ~/Music:/music:ro -v audio:/home/audio/home IMAGE
CMD ["sh", "-c", "audio-assets init . && exec dagster dev --host 0.0.0.0"]
