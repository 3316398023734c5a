"""What the pipeline warns of and refuses, as the page says it: it speaks of controls instead of flags, in both languages."""

from __future__ import annotations

import re

import gradio as gr

from dit.commands.demo.words import reads_chinese

# A whole message, and what stands for it in English (None: itself) and in Chinese; \1 is what the first group has found.
MESSAGES: list[tuple[str, str | None, str]] = [
    (r"the prompt is longer than (\d+) tokens; not read: (.+)", None, r"提示词超过 \1 个 token，这一部分没有读入：\2"),
    (
        r"the text encoder does not know (.+), in (.+); it knows (.+)",
        None,
        r"文本编码器不认识 \1（提示词 \2）；它认识的近似词：\3",
    ),
    (r"the text encoder does not know (.+), in (.+)", None, r"文本编码器不认识 \1（提示词 \2）"),
    (
        r"the model was trained on (.+) pixels; at (.+) things may come out twice",
        None,
        r"模型是在 \1 像素的图片上训练的；按 \2 生成时，物体可能重复出现",
    ),
    (
        r"the image to start from has (.+) pixels; it is resized to (.+)",
        None,
        r"起始图片为 \1 像素，已缩放到 \2",
    ),
    (
        r"the image to start from has (.+) pixels; its middle is taken, at (.+)",
        None,
        r"起始图片为 \1 像素，取其中央部分，按 \2 使用",
    ),
    (r"the mask is white nowhere, so that nothing changes", None, r"蒙版没有白色区域，图片不会改变"),
    (
        r"--negative_prompt changes nothing where --guidance_scale is 1",
        r"The negative prompt changes nothing where the guidance scale is 1",
        r"引导强度为 1 时，反向提示词不起作用",
    ),
    (
        r"the VAE of this model keeps little of this image \((\d+) dB\): it comes out changed",
        None,
        r"该模型的 VAE 难以还原这张图片（\1 dB），结果会与原图有出入",
    ),
    (
        r"(.+) is merged into (.+) already and counts twice here; it is for the model that it began with",
        None,
        r"\1 已经合并进 \2，再用一次会重复计算；它适用于训练时的起始模型",
    ),
    (r"(.+): is of another model: .+", None, r"\1 属于另一个模型，不能与所选模型一起使用"),
    (
        r"(.+?); (\d+) images at once are too many, (\d+) may fit: .+",
        r"\1: \2 images at once are too many, \3 may fit",
        r"内存或显存不足：一次生成 \2 张太多，\3 张可能放得下",
    ),
    (r"(.+?); a smaller height and width may fit(?:; .+)?", None, r"内存或显存不足：请减小高度和宽度"),
    (r"(.+): empty file", None, r"\1：空文件"),
    (r"(.+): only (.+) pixels; (\d+) a side are the least", None, r"\1：只有 \2 像素；每边至少需要 \3 像素"),
    (r"(.+): (\d+ x \d+) pixels take (.+) GB to decode, .+", None, r"\1：\2 像素太大，解码需要 \3 GB 内存；请缩小后再试"),
    (r"(.+): more pixels than the memory holds", None, r"\1：像素太多，内存放不下；请缩小后再试"),
    (r"(.+): an animation of (\d+) images, not one", None, r"\1：这是 \2 帧的动画，不是单张图片"),
    (r"(.+): HEIC or AVIF of a kind that is not read; .+", None, r"\1：无法读取这种 HEIC 或 AVIF；请另存为 JPEG 或 PNG"),
    (r"(.+): damaged: .+", None, r"\1：文件已损坏"),
    (r"(.+): (?:a web page, not an image|not an image)", None, r"\1：不是图片"),
]


def on_page(request: gr.Request | None, message: str) -> str:
    """Return what the page says for `message`, in the language that the browser prefers; in English where it has no other."""
    chinese = reads_chinese(request.headers.get("accept-language", "") if request else "")
    for pattern, english, other in MESSAGES:
        found = re.fullmatch(pattern, message, re.DOTALL)
        if found:
            template = other if chinese else english
            return found.expand(template) if template else message
    return message.replace("--", "")  # a flag of `dit generate` is a control here
