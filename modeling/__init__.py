"""Models and adapters; importing this package registers them with the Auto classes."""

import logging

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

# bitsandbytes 0.50 warns at every import on CPUs with AVX512-BF16 unless a kernel is fetched from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)

from .adapter_files import save_adapter
from .adapters import SpeechAdapterConfig, adapter_rows, load_speech_adapter
from .configuration_audio_lm import AudioLMConfig
from .configuration_deepspeech2 import DeepSpeech2Config
from .configuration_echostream import EchoStreamConfig
from .configuration_emformer import EmformerConfig
from .emformer_cache import EmformerCache
from .feature_extraction_deepspeech2 import DeepSpeech2FeatureExtractor
from .feature_extraction_echostream import EchoStreamFeatureExtractor
from .modeling_audio_lm import AudioLMForConditionalGeneration, AudioLMModel, AudioLMMultiModalProjector
from .modeling_deepspeech2 import DeepSpeech2ForCTC
from .modeling_echostream import EchoStreamForSpeechToSpeechTranslation
from .modeling_emformer import EmformerForCTC, EmformerModel
from .processing_audio_lm import AudioLMProcessor
from .processing_deepspeech2 import DeepSpeech2Processor
from .processing_echostream import EchoStreamProcessor
from .tokenization_deepspeech2 import JamoCTCTokenizer

__all__ = [
    "AudioLMConfig",
    "AudioLMForConditionalGeneration",
    "AudioLMModel",
    "AudioLMMultiModalProjector",
    "AudioLMProcessor",
    "DeepSpeech2Config",
    "DeepSpeech2FeatureExtractor",
    "DeepSpeech2ForCTC",
    "DeepSpeech2Processor",
    "EchoStreamConfig",
    "EchoStreamFeatureExtractor",
    "EchoStreamForSpeechToSpeechTranslation",
    "EchoStreamProcessor",
    "EmformerCache",
    "EmformerConfig",
    "EmformerForCTC",
    "EmformerModel",
    "JamoCTCTokenizer",
    "SpeechAdapterConfig",
    "adapter_rows",
    "load_speech_adapter",
    "save_adapter",
]

AutoConfig.register(DeepSpeech2Config.model_type, DeepSpeech2Config, exist_ok=True)
AutoConfig.register(EmformerConfig.model_type, EmformerConfig, exist_ok=True)
AutoModel.register(EmformerConfig, EmformerModel, exist_ok=True)
AutoModelForCTC.register(EmformerConfig, EmformerForCTC, exist_ok=True)
AutoModelForCTC.register(DeepSpeech2Config, DeepSpeech2ForCTC, exist_ok=True)
AutoFeatureExtractor.register(EmformerConfig, EchoStreamFeatureExtractor, exist_ok=True)
AutoProcessor.register(EmformerConfig, DeepSpeech2Processor, exist_ok=True)
AutoTokenizer.register(EmformerConfig, slow_tokenizer_class=JamoCTCTokenizer, exist_ok=True)
AutoFeatureExtractor.register(DeepSpeech2Config, DeepSpeech2FeatureExtractor, exist_ok=True)
AutoProcessor.register(DeepSpeech2Config, DeepSpeech2Processor, exist_ok=True)
AutoTokenizer.register(DeepSpeech2Config, slow_tokenizer_class=JamoCTCTokenizer, exist_ok=True)
AutoConfig.register(EchoStreamConfig.model_type, EchoStreamConfig, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(EchoStreamConfig, EchoStreamForSpeechToSpeechTranslation, exist_ok=True)
AutoFeatureExtractor.register(EchoStreamConfig, EchoStreamFeatureExtractor, exist_ok=True)
AutoProcessor.register(EchoStreamConfig, EchoStreamProcessor, exist_ok=True)

AutoConfig.register(AudioLMConfig.model_type, AudioLMConfig, exist_ok=True)
AutoModel.register(AudioLMConfig, AudioLMModel, exist_ok=True)
AutoModelForMultimodalLM.register(AudioLMConfig, AudioLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AudioLMConfig, AudioLMProcessor, exist_ok=True)

# The same classes travel with a checkpoint to the Hub.
DeepSpeech2Config.register_for_auto_class()
EmformerConfig.register_for_auto_class()
EmformerModel.register_for_auto_class("AutoModel")
EmformerForCTC.register_for_auto_class("AutoModelForCTC")
DeepSpeech2ForCTC.register_for_auto_class("AutoModelForCTC")
DeepSpeech2FeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
DeepSpeech2Processor.register_for_auto_class("AutoProcessor")
JamoCTCTokenizer.register_for_auto_class("AutoTokenizer")
EchoStreamConfig.register_for_auto_class()
EchoStreamForSpeechToSpeechTranslation.register_for_auto_class("AutoModelForSpeechSeq2Seq")
EchoStreamFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
EchoStreamProcessor.register_for_auto_class("AutoProcessor")
AudioLMConfig.register_for_auto_class()
AudioLMModel.register_for_auto_class("AutoModel")
AudioLMForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
AudioLMProcessor.register_for_auto_class("AutoProcessor")
