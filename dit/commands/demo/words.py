"""What the page says, in English and in Chinese: labels are chosen by the browser, answers by what it says it reads."""

from __future__ import annotations

import gradio as gr

text = gr.I18n()  # stands for a label, by its key
# Labels: key, English, Chinese. Gradio shows the one of the browser's language.
LABELS = {
    "title": ("# Generate images with your model", "# 用你的模型画图"),
    "tab_draw": ("Generate", "生成"),
    "tab_compare": ("Compare", "对比"),
    "prompt": ("Prompt", "提示词"),
    "prompt_info": (
        "What the image shows. Write as the captions of the training set are written.",
        "描述画面内容；写法与训练集的图片说明一致时效果最好。",
    ),
    "negative_prompt": ("Negative prompt", "反向提示词"),
    "negative_prompt_info": (
        "What no image should show; needs guidance above 1.",
        "画面中不应出现的内容；引导强度大于 1 时才起作用。",
    ),
    "count": ("Images", "生成张数"),
    "seed": ("Seed", "随机种子"),
    "new_seed": ("A new seed each time", "每次使用新种子"),
    "settings": ("Settings", "采样设置"),
    "settings_a": ("Settings A", "设置 A"),
    "settings_b": ("Settings B", "设置 B"),
    "model": ("Model", "模型"),
    "scheduler": ("Scheduler", "采样器"),
    "steps": ("Steps", "采样步数"),
    "guidance": ("Guidance scale", "引导强度"),
    "guidance_info": ("How strictly to follow the prompt; 1 is without guidance.", "越大越贴合提示词；1 表示不使用引导。"),
    "width": ("Width", "宽度"),
    "height": ("Height", "高度"),
    "lora": ("LoRA adapters", "LoRA 适配器"),
    "lora_info": (
        "What a training with train.method lora has learned beside the model.",
        "以 train.method: lora 训练得到的增量权重。",
    ),
    "lora_scale": ("Scale of the adapters", "适配器强度"),
    "lora_scale_info": ("0 is without them, 1 as they were trained.", "0 表示不使用，1 为训练时的强度。"),
    "change": ("Change an image", "修改图片"),
    "change_info": (
        "An image is changed as the prompt says. Paint over a part of it, and only that part changes.",
        "选一张图片，按提示词修改；用画笔涂抹某处，则只修改涂过的地方。",
    ),
    "upload": ("Choose an image …", "选择图片……"),
    "editor": ("Image to start from", "起始图片"),
    "strength": ("Strength", "修改强度"),
    "strength_info": (
        "0: no change; 1: nothing is kept. What is painted is always generated anew.",
        "0：不改动；1：全部重画。涂抹处总是完全重画。",
    ),
    "draw": ("Generate", "生成"),
    "draw_both": ("Generate both", "生成两组"),
    "cancel": ("Cancel", "取消"),
    "live": ("Being generated", "生成过程"),
    "result_a": ("With settings A", "设置 A 的结果"),
    "result_b": ("With settings B", "设置 B 的结果"),
    "gallery": ("Your images, the newest first; choose one for its settings", "你的图片（新的在前），点选查看生成参数"),
    "facts": ("How the chosen image was made", "所选图片的生成参数"),
    "again": ("Generate again", "用相同参数重画"),
    "edit": ("Change this image", "修改这张图片"),
    "nearest": ("Nearest training images", "最接近的训练图片"),
    "nearest_gallery": ("The training images that are nearest to it, by CLIP", "CLIP 特征最接近的训练图片"),
}
# Answers of the server, chosen by the request's Accept-Language.
ANSWERS = {
    "starting": ("Loading the model …", "正在加载模型……"),
    "step": ("Step {step} of {steps}, about {seconds:.0f} s to go", "第 {step} / {steps} 步，预计还需 {seconds:.0f} 秒"),
    "done": ("Done in {seconds:.1f} s. Saved in {folder}", "完成，用时 {seconds:.1f} 秒。图片已保存到 {folder}"),
    "cancelled": ("Cancelled.", "已取消。"),
    "looking": ("Looking among the training images …", "正在训练图片中查找……"),
    "no_prompt": ("Write a prompt first.", "请先输入提示词。"),
    "choose_first": ("Choose an image of the gallery first.", "请先在图库中点选一张图片。"),
    "no_training_set": (
        "The training images or latents are not here: `dvc pull data/raw data/latents` fetches them, `dvc repro` makes them.",
        "找不到训练图片或潜变量：可用 `dvc pull data/raw data/latents` 取回，或用 `dvc repro` 生成。",
    ),
    "failed": (
        "Something went wrong, and the terminal of the server says what. The page still works.",
        "出错了，详情见服务器终端；页面仍可继续使用。",
    ),
}


def labels() -> gr.I18n:
    """Return the labels for `Blocks.launch`; Chinese ones for all of its regions, as browsers name them."""
    english, chinese = ({key: words[k] for key, words in LABELS.items()} for k in range(2))
    return gr.I18n(**{"en": english} | dict.fromkeys(("zh", "zh-CN", "zh-TW", "zh-HK"), chinese))


def answer(request: gr.Request | None, key: str, **values: object) -> str:
    """Return an answer in the language that the browser prefers of the two."""
    preferred = request.headers.get("accept-language", "") if request else ""
    return ANSWERS[key][reads_chinese(preferred)].format(**values)


def reads_chinese(accept_language: str) -> bool:
    """Return whether Chinese comes before English in an Accept-Language header (RFC 9110, section 12.5.4)."""
    weights = {"zh": 0.0, "en": 0.0}
    for part in accept_language.lower().split(","):
        tag, _, weight = part.strip().partition(";q=")
        language = tag.split("-")[0]
        if language in weights:
            try:
                weights[language] = max(weights[language], float(weight or 1))
            except ValueError:
                continue
    return weights["zh"] > weights["en"]
