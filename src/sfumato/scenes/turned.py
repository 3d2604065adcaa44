"""A scene seen in a mirror, and a clip run backwards: scenes again, of which captions and truth can be had anew."""

from __future__ import annotations

import math
from dataclasses import replace

from sfumato.scenes.graph import GRAVITY, Object, Scene


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right exchanged: its picture is that of `scene`, flipped."""
    camera, light = scene.camera, scene.light
    x, y, z = camera.target
    return replace(
        scene,
        objects=tuple(_mirrored(obj) for obj in scene.objects),
        camera=replace(camera, azimuth=-camera.azimuth, target=(-x, y, z), turn=-camera.turn),
        light=replace(light, azimuth=-light.azimuth),
    )


def backwards(scene: Scene) -> Scene:
    """The clip from its last frame to its first."""
    seconds = scene.times()[-1]
    camera = scene.camera.at(seconds)
    return replace(
        scene,
        objects=tuple(_backwards(obj, seconds) for obj in scene.objects),
        camera=replace(camera, turn=-camera.turn, dolly=-camera.dolly),
    )


def _mirrored(obj: Object) -> Object:
    x, y, z = obj.position
    u, v = obj.velocity
    cx, cy, rate = obj.orbit
    return replace(
        obj, position=(-x, y, z), velocity=(-u, v), orbit=(-cx, cy, -rate), yaw=-obj.yaw, spin=-obj.spin
    )


def _backwards(obj: Object, seconds: float) -> Object:
    x, y, _, yaw = obj.at(seconds)
    u, v = obj.velocity
    cx, cy, rate = obj.orbit
    phase = obj.phase
    if obj.hop > 0:
        phase = (1 - seconds / (2 * math.sqrt(2 * obj.hop / GRAVITY)) - phase) % 1.0
    return replace(
        obj,
        position=(x, y, obj.position[2]),
        velocity=(-u, -v),
        orbit=(cx, cy, -rate),
        yaw=yaw,
        spin=-obj.spin,
        phase=phase,
    )
