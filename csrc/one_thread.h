// Keeps the products of a thread on that thread.
#pragma once

#include <ATen/Parallel.h>

#ifdef __linux__
// As oneMKL has it, which is a part of PyTorch's library where PyTorch uses it.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
#endif

namespace cac_fast {

// Products of this thread by one thread, for as long as this is there. oneMKL's are by one in a
// parallel region anyway, but rounded as if they were shared out over as many as there are.
class OneThread {
 public:
#ifdef __linux__
  OneThread() {
    at::get_num_threads();  // a thread's first call of this sets oneMKL's number too
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  int before_ = 0;
#endif
};

}  // namespace cac_fast
