"""The services of docker-compose.yml whose images are the project's own as containers, beside the others as processes.

They share this machine's network, so that addresses are those of `NativeStack`; what they write goes to volumes of the
engine, which get the owner that the image gives the folder, and their own file system is read-only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.deployments.engine import Engine
from tests.stack.native import Native, NativeStack

LOCKED_DOWN = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@dataclass
class ContainerStack(NativeStack):
    """A stack of which everything that has an image of ours runs in it."""

    engine: Engine = field(kw_only=True)
    shared: Path = field(kw_only=True)  # a folder that the worker finds at the same path, as a checkout with data is

    def localize(self, text: str, name: str) -> str:
        """What a text of the service `name` means on this machine: in a container, paths are its own."""
        return self.name_addresses(text, name) if name in self.containers else super().localize(text, name)

    @property
    def containers(self) -> dict[str, str]:
        """Service -> name of its container."""
        return {
            name: f"{self.root.name}-{name}"
            for name, service in self.services.items()
            if service.image.startswith("ekiben-")
        }

    def _make(self, name: str) -> Native:
        if name not in self.containers:
            return super()._make(name)
        service, container = self.services[name], self.containers[name]
        variables = {key: self.localize(value, name) for key, value in service.environment.items()}
        volumes = [f"--volume={container}-{source}:{target}" for target, source in service.volumes.items()]
        if name == "worker":
            volumes.append(f"--volume={self.shared}:{self.shared}:ro")
        argv = [self.engine.name, "run", "--rm", f"--name={container}", "--network=host", *LOCKED_DOWN, *volumes]
        argv += [f"--tmpfs={target}" for target in sorted({"/tmp", *service.tmpfs})]
        argv += [f"--env={key}" for key in variables]
        argv += [service.image, *(self.localize(part, name) for part in service.command)]
        health = [self.engine.name, "exec", container, *(self.localize(part, name) for part in service.health)]
        environment = os.environ | self.engine.environment | variables
        return Native(service, argv, environment, health, self.app, self.root / f"{name}.log")

    def stop(self) -> None:
        """End all that runs, and take containers and volumes away."""
        super().stop()
        for name, container in self.containers.items():
            self.engine.run("rm", "--force", "--volumes", container, check=False)
            for source in self.services[name].volumes.values():
                self.engine.run("volume", "rm", "--force", f"{container}-{source}", check=False)
