// Calling ONNX Runtime's API: statuses become exceptions on the way in, and exceptions statuses on the way out.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "contract.h"
#include "ort_api.h"

namespace mla_pass::ort {

// The table that ONNX Runtime handed over; null before the library is registered.
extern const OrtApi* api;

// Version of the newest slots in use that it has.
extern std::uint32_t newest;

// A status that nobody can be told of.
inline void drop(OrtStatus* status) {
  if (status != nullptr) function<ReleaseStatus>(api)(status);
}

// Call a slot; a status it returns is thrown as an exception.
template <class S, class... Arguments>
void call(Arguments... arguments) {
  OrtStatus* status = function<S>(api)(arguments...);
  if (status == nullptr) return;
  const std::string message = function<GetErrorMessage>(api)(status);
  function<ReleaseStatus>(api)(status);
  throw std::runtime_error(message);
}

// Run `work`; what it throws becomes a status, for no exception may pass through C.
template <class Work>
OrtStatus* guarded(const Work& work) {
  const auto create = function<CreateStatus>(api);
  try {
    work();
    return nullptr;
  } catch (const Refused& error) {
    return create(static_cast<int>(Code::invalid_argument), error.what());
  } catch (const std::exception& error) {
    return create(static_cast<int>(Code::fail), (std::string("LatentAttention: ") + error.what()).c_str());
  }
}

}  // namespace mla_pass::ort
