"""The files of a Flex Template: metadata, container spec, Dockerfile, launcher, README; all of one list of parameters.

The image is the launcher's and the workers' at once: Beam's SDK container with this package and Google's launcher in
it. So what builds the graph is what runs it, and no worker installs anything as it starts.
"""

import dataclasses
import importlib.metadata
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.definition import Pipeline
from pipelines.template_parameters import Parameter

_EXAMPLES = {
    "history": "gs://BUCKET/history/*.parquet",
    "warehouse": "gs://BUCKET/warehouse",
    "dead_letters": "gs://BUCKET/dead_letters",
    "report": "gs://BUCKET/run.json",
    "state": "gs://BUCKET/state",
    "live": "LOG",
}


@dataclasses.dataclass(frozen=True)
class Flex:
    """A Flex Template. name: what the definition is loaded by. mode: batch or stream."""

    name: str
    pipeline: Pipeline
    mode: str
    image: str
    parameters: Sequence[Parameter]

    def write(self, folder: Path) -> None:
        """Writes the files, with this package and, if it is a file, the definition. Raises UserError."""
        from pipelines.runners.package import sdist

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.tar.gz"):
            old.unlink()
        package = sdist(folder).name
        if self._file is not None:
            shutil.copy(self._file, folder)
        for name, text in {
            "metadata.json": json.dumps(self.metadata(), indent=2, ensure_ascii=False) + "\n",
            "template.json": json.dumps(self.spec(), indent=2, ensure_ascii=False) + "\n",
            "Dockerfile": self.dockerfile(package),
            "launch.py": self.launcher(),
            "launch.sh": self.command() + "\n",
            "README.md": self.readme(),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")

    @property
    def streaming(self) -> bool:
        return self.mode == "stream"

    @property
    def _file(self) -> Path | None:
        path = self.name.partition(":")[0]
        return Path(path) if path.endswith(".py") else None

    @property
    def place(self) -> str:
        """Where the container spec goes."""
        return f"gs://BUCKET/templates/{self.pipeline.name}-{self.mode}.json"

    def metadata(self) -> dict[str, Any]:
        """As ``gcloud dataflow flex-template build --metadata-file`` takes it."""
        told: dict[str, Any] = {"name": f"{self.pipeline.name} {self.mode}", "description": self.pipeline.doc}
        told |= {"streaming": self.streaming, "parameters": [one.metadata() for one in self.parameters]}
        once = {"supportsExactlyOnce": True, "supportsAtLeastOnce": False, "defaultStreamingMode": "EXACTLY_ONCE"}
        return told | once if self.streaming else told

    def spec(self) -> dict[str, Any]:
        """The file in Cloud Storage that a launch names."""
        environment: dict[str, Any] = {"sdkContainerImage": self.image, "machineType": "n2-standard-2"}
        if self.streaming:
            environment |= {"enableStreamingEngine": True, "streamingMode": "STREAMING_MODE_EXACTLY_ONCE"}
        told = {"image": self.image, "sdkInfo": {"language": "PYTHON"}, "metadata": self.metadata()}
        return told | {"defaultEnvironment": environment}

    def dockerfile(self, package: str) -> str:
        """Beam's SDK with this package, and Google's launcher beside it."""
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        launcher = f"gcr.io/dataflow-templates-base/{python.replace('.', '')}-template-launcher-base:latest"
        program = "/opt/google/dataflow/python_template_launcher"
        return f"""# Launches {self.pipeline.name} ({self.mode}) and runs its workers.
FROM apache/beam_{python}_sdk:{importlib.metadata.version("apache-beam")}
COPY --from={launcher} {program} {program}
WORKDIR /template
COPY {package} ./
RUN pip install --no-cache-dir './{package}[gcp,aws]' && pip check
COPY launch.py{f" {self._file.name}" if self._file else ""} ./
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/launch.py
ENTRYPOINT ["/opt/apache/beam/boot"]
"""

    def launcher(self) -> str:
        """The program that the launcher starts."""
        name = self.name if self._file is None else f"/template/{self._file.name}:{self.name.partition(':')[2]}"
        image = f"--sdk_container_image={self.image}"
        return f'''"""Builds the graph of {self.pipeline.name} ({self.mode}) as it is launched."""

import sys

from pipelines.template import launch

if __name__ == "__main__":
    given = sys.argv[1:]
    image = [] if any(flag.startswith("--sdk_container_image=") for flag in given) else [{image!r}]
    launch({name!r}, {self.mode!r}, [*given, *image])
'''

    def command(self) -> str:
        """What launches it."""
        job = f"{self.pipeline.name.replace('_', '-')}-{self.mode}"
        lines = [
            f"gcloud dataflow flex-template run {job}",
            f"--template-file-gcs-location={self.place}",
            "--region=REGION",
            "--temp-location=gs://BUCKET/tmp",
        ]
        asked = [one for one in self.parameters if not one.optional or one.name == "history"]
        lines += [f"--parameters={one.name}={shlex.quote(_example(one))}" for one in asked]
        return " \\\n  ".join(lines)

    def readme(self) -> str:
        """How it is built, launched and launched again."""
        rows = "\n".join(
            f"| `{one.name}` | {'' if one.optional else 'yes'} | {f'`{one.default}`' if one.default else ''} | "
            f"`{one.regex.replace('|', chr(92) + '|')}` | {one.help} |"
            for one in self.parameters
        )
        key = _KEY if self.pipeline.source.schema.personal else ""
        views = ", ".join(view.name for view in self.pipeline.views) or "no views"
        return f"""# {self.pipeline.name}, {self.mode}: a Dataflow Flex Template

{self.pipeline.doc or self.pipeline.name}. Views: {views}.

Build the image, and put the container spec where it is launched from:

```
docker build -t {self.image} . && docker push {self.image}
gcloud storage cp template.json {self.place}
```

`gcloud builds submit --tag={self.image} .` builds it without Docker. Launch (`launch.sh`):

```
{self.command()}
```

| parameter | required | default | must match | |
|---|---|---|---|---|
{rows}

{_STREAM if self.streaming else _BATCH}
{key}"""


_BATCH = """Launching it again is another run: it replaces what it computes in one commit, and a run that dies leaves
readers on the old answer. What was read, kept and refused, and the digests, are then beside `report`, in a file whose
name ends in `.facts.json`."""

_STREAM = """It runs on Streaming Engine in exactly-once mode; at least once would count rows twice. Drain it with
`gcloud dataflow jobs drain JOB`: that closes the open windows early, so their last answers are of the rows so far."""


_KEY = """
It encrypts personal columns: the launcher and every worker need one key, `PIPELINES_KEY` or `PIPELINES_KEY_FILE`, in
their environment. Put it into the image's environment from a secret, and never into a parameter, which Dataflow shows.
"""


def _example(parameter: Parameter) -> str:
    return _EXAMPLES.get(parameter.name, f"gs://BUCKET/{parameter.name.removeprefix('dimension_')}.csv")
