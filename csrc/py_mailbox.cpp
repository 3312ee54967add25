// The Python face of mailbox.h.
#include "mailbox.h"

#include <string>
#include <utility>

#include "moe_block.h"
#include "py_arguments.h"

namespace moert {
namespace {

constexpr const char* kMailboxName = "moert.mailbox";
constexpr uint64_t kMostExperts = 1 << 16;

// In a fork there is no thread to end, and nobody who could say so.
void destroy_mailbox(PyObject* capsule) {
    auto* box = static_cast<Mailbox*>(PyCapsule_GetPointer(capsule, kMailboxName));
    if (box->in_fork()) return;
    without_gil([&] { delete box; });
}

PyObject* py_mailbox_open(PyObject*, PyObject* args) {
    PyObject *posted, *answered, *failed, *header, *ids, *weights, *hidden, *sums, *most_object;
    if (!PyArg_ParseTuple(args, "OOOOOOOOO:mailbox_open", &posted, &answered, &failed, &header, &ids, &weights, &hidden,
                          &sums, &most_object)) {
        return nullptr;
    }
    struct {
        PyObject* object;
        const char* name;
        const uint8_t* address;
    } fields[] = {{posted, "posted", nullptr}, {answered, "answered", nullptr}, {failed, "failed", nullptr},
                  {header, "header", nullptr}, {ids, "ids", nullptr},           {weights, "weights", nullptr},
                  {hidden, "hidden", nullptr}, {sums, "sums", nullptr}};
    for (auto& field : fields)
        if (!as_address(field.object, field.name, 4, false, &field.address)) return nullptr;
    uint64_t most;
    if (!as_unsigned(most_object, "most", kMostExperts, &most)) return nullptr;
    const auto word = [&](int i) { return reinterpret_cast<FutexWord*>(const_cast<uint8_t*>(fields[i].address)); };
    Letters letters;
    letters.posted = word(0);
    letters.answered = word(1);
    letters.failed = word(2);
    letters.header = reinterpret_cast<const int32_t*>(fields[3].address);
    letters.ids = reinterpret_cast<const int32_t*>(fields[4].address);
    letters.weights = reinterpret_cast<const float*>(fields[5].address);
    letters.hidden = fields[6].address;
    letters.sums = reinterpret_cast<float*>(const_cast<uint8_t*>(fields[7].address));
    letters.most = static_cast<int64_t>(most);
    std::unique_ptr<Mailbox> box;
    if (!with_errors([&] { box = std::make_unique<Mailbox>(letters); })) return nullptr;
    PyObject* capsule = PyCapsule_New(box.get(), kMailboxName, destroy_mailbox);
    if (capsule != nullptr) box.release();
    return capsule;
}

PyObject* py_mailbox_layer(PyObject*, PyObject* args) {
    PyObject *box_object, *index_object, *gate_object, *table_object;
    const char* number_name;
    if (!PyArg_ParseTuple(args, "OOO!sO:mailbox_layer", &box_object, &index_object, &PyTuple_Type, &gate_object,
                          &number_name, &table_object)) {
        return nullptr;
    }
    auto* box = disclose<Mailbox>(box_object, kMailboxName);
    uint64_t index;
    MailLayer layer;
    if (box == nullptr || !as_unsigned(index_object, "layer", kMostExperts, &index) ||
        !as_gate(gate_object, &layer.gate) || !as_number(number_name, &layer.number)) {
        return nullptr;
    }
    const auto* table = disclose<ExpertTable>(table_object, kExpertTableName);
    if (table == nullptr) return nullptr;
    Step step;
    step.gate = layer.gate;
    step.number = layer.number;
    step.hidden = layer.hidden = table->hidden;
    step.width = layer.width = table->width;
    for (const Expert& expert : table->experts)
        if (!check_expert(expert, step)) return nullptr;
    if (!with_errors([&] { layer.experts = table->experts; })) return nullptr;
    if (!without_gil([&] { box->set_layer(index, std::move(layer)); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_mailbox_arm(PyObject*, PyObject* object) {
    auto* box = disclose<Mailbox>(object, kMailboxName);
    if (box == nullptr || !with_errors([&] { box->arm(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_mailbox_pause(PyObject*, PyObject* object) {
    auto* box = disclose<Mailbox>(object, kMailboxName);
    if (box == nullptr || !without_gil([&] { box->pause(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_mailbox_close(PyObject*, PyObject* object) {
    auto* box = disclose<Mailbox>(object, kMailboxName);
    if (box == nullptr || !without_gil([&] { box->close(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_mailbox_state(PyObject*, PyObject* object) {
    const auto* box = disclose<Mailbox>(object, kMailboxName);
    if (box == nullptr) return nullptr;
    std::string why;
    if (!with_errors([&] { why = box->failure(); })) return nullptr;
    return Py_BuildValue("Kz", static_cast<unsigned long long>(box->messages()), why.empty() ? nullptr : why.c_str());
}

PyObject* py_stop_mailboxes(PyObject*, PyObject*) {
    if (!without_gil([] { stop_mailboxes(); })) return nullptr;
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef mailbox_methods[] = {
    {"mailbox_open", py_mailbox_open, METH_VARARGS,
     "mailbox_open(posted, answered, failed, header, ids, weights, hidden, sums, most) -> capsule\n\nAnswers messages "
     "of at most so many experts, all else addresses; see mailbox.h. The memory must outlive the capsule."},
    {"mailbox_layer", py_mailbox_layer, METH_VARARGS,
     "mailbox_layer(mailbox, layer, gate, number, table)\n\nThe experts of a layer, which messages may name from now "
     "on; numbers of layers follow each other. What the table points to must stay while the mailbox is armed."},
    {"mailbox_arm", py_mailbox_arm, METH_O,
     "mailbox_arm(mailbox)\n\nMessages are expected: they are answered from now on. RuntimeError in a fork and once it "
     "is closed."},
    {"mailbox_pause", py_mailbox_pause, METH_O,
     "mailbox_pause(mailbox)\n\nBlocks, without the GIL, until no message is being answered; none will be until "
     "mailbox_arm."},
    {"mailbox_close", py_mailbox_close, METH_O,
     "mailbox_close(mailbox)\n\nNobody answers any more; who waits for an answer is told so."},
    {"mailbox_state", py_mailbox_state, METH_O,
     "mailbox_state(mailbox) -> (int, str | None)\n\nMessages answered so far, and why an answer is none."},
    {"stop_mailboxes", py_stop_mailboxes, METH_NOARGS,
     "stop_mailboxes()\n\nFor the exit of the interpreter: closes all mailboxes of this process."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
