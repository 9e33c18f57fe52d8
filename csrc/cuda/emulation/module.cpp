// The module _emulated: the functions of the CUDA backend, run on the host with host addresses, and
// functions for tests to check its accesses.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "faulty.h"
#include "machine.h"
#include "memory.h"

namespace py = pybind11;
namespace emulation = oprd::emulation;

namespace {

// (kind, mode, address, bytes an item, sizes, strides).
using RegionTuple = std::tuple<std::string, std::string, std::uintptr_t, std::int64_t,
                               std::vector<std::int64_t>, std::vector<std::int64_t>>;

void allow(const std::vector<RegionTuple>& tuples) {
  std::vector<emulation::Region> regions;
  for (const auto& [kind, mode, address, item_bytes, sizes, strides] : tuples) {
    emulation::Region region;
    region.kind = kind;
    region.mode = mode;
    region.address = address;
    region.item_bytes = item_bytes;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      region.dimensions.push_back({sizes[i], strides[i]});
    }
    regions.push_back(std::move(region));
  }
  emulation::memory().allow(std::move(regions));
}

// Returns {kind: (bytes loaded, bytes stored)} since the last call.
py::dict take_traffic() {
  py::dict found;
  for (auto& [kind, traffic] : emulation::memory().traffic()) {
    found[py::str(kind)] = py::make_tuple(traffic.loaded, traffic.stored);
    traffic = {};
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "oprd's CUDA kernels, emulated on the host for tests.";
  oprd::bind_cuda(m);
  m.def("allow", &allow);
  m.def("take_traffic", &take_traffic);
  m.def("launches", [] { return emulation::memory().launches(); });  // number of launches so far
  m.def("seed", &emulation::seed);
  m.def("run_faulty", [](const std::string& name, std::uintptr_t data, int n) {
    emulation::run_faulty(name, reinterpret_cast<float*>(data), n);
  });
}
