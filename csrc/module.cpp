// The extension module. Its functions check arguments, release the GIL and raise exceptions; everything else in csrc/
// is plain C++ over raw pointers.
#include "py.h"

#include <initializer_list>

#include "foresight.h"
#include "pool.h"

namespace {

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "moert._C",
    "C++ parts of moert. Addresses are plain integers, and nothing here owns the memory at them.",
    -1,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    PyObject* module = PyModule_Create(&definition);
    if (module == nullptr) return nullptr;
    for (PyMethodDef* methods :
         {moert::memory_methods, moert::matrix_methods, moert::ffn_methods, moert::arriving_methods,
          moert::norm_methods, moert::rotary_methods, moert::gate_look_methods, moert::attention_methods,
          moert::self_attention_methods, moert::moe_block_methods, moert::token_layer_methods, moert::identity_methods,
          moert::pool_methods, moert::reader_methods, moert::read_plan_methods, moert::moves_methods,
          moert::mailbox_methods}) {
        if (PyModule_AddFunctions(module, methods) != 0) {
            Py_DECREF(module);
            return nullptr;
        }
    }
    moert::set_pastime(moert::bring_piece);
    return module;
}
