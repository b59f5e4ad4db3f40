"""Importing this turns the adapter on: what verl's `model.external_lib` asks for."""

from drift_kernels.adapters.verl.swap import enable

enable()
