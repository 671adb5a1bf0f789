// Runs an exported detector in C++ and prints its detections: label, score, x1 y1 x2 y2 in pixels.
//
//     detect MODEL.pt2 LIBMSDA_CPU.so IMAGE.ppm [MIN_SCORE]
//
// The model takes an image (1, height, width, 3) uint8 RGB of the size it was exported for, and returns boxes (1, n,
// 4), scores (1, n) and labels (1, n).
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

// Registers the operator's CPU kernels, then its schemas.
void load_operators(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  auto define = reinterpret_cast<void (*)()>(dlsym(handle, "msda_define_operators"));
  if (define == nullptr) throw std::runtime_error(library + " is not libmsda_cpu.so: " + dlerror());
  define();
}

// Reads a binary PPM file (P6, 8 bits) as (1, height, width, 3).
torch::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, maximum = 0;
  file >> magic >> width >> height >> maximum;
  file.get();
  if (magic != "P6" || maximum != 255)
    throw std::runtime_error(path + " is not a binary PPM file with 8 bits (P6, 255)");
  torch::Tensor image = torch::empty({1, height, width, 3}, torch::kUInt8);
  file.read(reinterpret_cast<char*>(image.data_ptr<uint8_t>()), image.numel());
  if (!file) throw std::runtime_error(path + " ends before its last pixel");
  return image;
}

int main(int argc, char** argv) try {
  if (argc < 4) {
    std::cerr << "usage: detect MODEL.pt2 LIBMSDA_CPU.so IMAGE.ppm [MIN_SCORE]\n";
    return 2;
  }
  const double min_score = argc > 4 ? std::stod(argv[4]) : 0.3;
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // an image of another size is an error
  load_operators(argv[2]);
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const c10::InferenceMode inference;
  const std::vector<torch::Tensor> outputs = model.run({read_image(argv[3])});
  const torch::Tensor boxes = outputs[0][0].contiguous(), scores = outputs[1][0], labels = outputs[2][0];
  for (int64_t i = 0; i < scores.size(0); ++i) {
    const double score = scores[i].item<double>();
    const auto label = labels[i].item<int64_t>();
    if (score < min_score || label < 0) continue;  // -1: no further detections
    const float* box = boxes[i].data_ptr<float>();
    std::printf("%lld %.6f %.3f %.3f %.3f %.3f\n", static_cast<long long>(label), score, box[0], box[1], box[2],
                box[3]);
  }
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "detect: " << argv[1] << ": " << error.what_without_backtrace() << '\n';
  return 1;
} catch (const std::exception& error) {
  std::cerr << "detect: " << error.what() << '\n';
  return 1;
}
