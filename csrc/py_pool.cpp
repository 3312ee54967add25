// The Python face of pool.h.
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pool.h"
#include "py.h"

namespace moert {
namespace {

constexpr int kMostProbeTasks = 1 << 22;

// Takes over the reference to `value`, which may be null with an exception set.
bool put(PyObject* dict, const char* name, PyObject* value) {
    if (value == nullptr) return false;
    const bool done = PyDict_SetItemString(dict, name, value) == 0;
    Py_DECREF(value);
    return done;
}

PyObject* as_list(const std::vector<int>& numbers) {
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(numbers.size()));
    for (size_t i = 0; list != nullptr && i < numbers.size(); i++) {
        PyObject* number = PyLong_FromLong(numbers[i]);
        // It takes the reference over even where it fails.
        if (number == nullptr || PyList_SetItem(list, static_cast<Py_ssize_t>(i), number) != 0) Py_CLEAR(list);
    }
    return list;
}

PyObject* as_nodes(const std::vector<NumaNode>& nodes) {
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(nodes.size()));
    for (size_t i = 0; list != nullptr && i < nodes.size(); i++) {
        PyObject* cpus = as_list(nodes[i].cpus);
        if (cpus == nullptr || PyList_SetItem(list, static_cast<Py_ssize_t>(i), cpus) != 0) Py_CLEAR(list);
    }
    return list;
}

bool put_limits(PyObject* dict, const CpuLimits& limits) {
    const bool limited = std::isfinite(limits.quota_cpus);
    return put(dict, "allowed_cpus", as_list(limits.cpus)) &&
           put(dict, "physical_cores", PyLong_FromLong(limits.physical_cores)) &&
           put(dict, "quota_cpus", limited ? PyFloat_FromDouble(limits.quota_cpus) : Py_NewRef(Py_None)) &&
           put(dict, "quota_source",
               limited ? PyUnicode_DecodeFSDefault(limits.quota_source.c_str()) : Py_NewRef(Py_None)) &&
           put(dict, "numa_nodes", as_nodes(limits.nodes));
}

PyObject* describe(const PoolInfo& info, bool with_workers) {
    PyObject* dict = PyDict_New();
    if (dict == nullptr) return nullptr;
    if (put(dict, "threads", PyLong_FromLong(info.threads)) &&
        put(dict, "why", PyUnicode_DecodeFSDefault(info.why.c_str())) &&
        (!with_workers || put(dict, "workers", PyLong_FromLong(info.workers))) && put_limits(dict, info.limits)) {
        return dict;
    }
    Py_DECREF(dict);
    return nullptr;
}

PyObject* py_threads(PyObject*, PyObject*) {
    int count = 0;
    if (!without_gil([&] { count = threads(); })) return nullptr;
    return PyLong_FromLong(count);
}

PyObject* py_set_threads(PyObject*, PyObject* object) {
    int count = 0;
    if (object != Py_None && !as_count(object, "threads", kMaxPoolThreads, &count)) return nullptr;
    if (!without_gil([&] { count = set_threads(count); })) return nullptr;
    return PyLong_FromLong(count);
}

PyObject* py_stop_threads(PyObject*, PyObject*) {
    if (!without_gil([] { stop_threads(); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_pool_info(PyObject*, PyObject*) {
    PoolInfo info;
    if (!without_gil([&] { info = pool_info(); })) return nullptr;
    return describe(info, true);
}

PyObject* py_cpu_limits(PyObject*, PyObject* args) {
    PyObject *root_object, *cpus_object;
    if (!PyArg_ParseTuple(args, "O&O:cpu_limits", PyUnicode_FSConverter, &root_object, &cpus_object)) return nullptr;
    const std::string root = PyBytes_AsString(root_object);
    Py_DECREF(root_object);
    const Py_ssize_t count = PySequence_Size(cpus_object);
    if (count < 0) return nullptr;
    std::vector<int> cpus;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject* number = PySequence_GetItem(cpus_object, i);
        uint64_t cpu = 0;
        const bool good = number != nullptr && as_unsigned(number, "cpu", 1 << 16, &cpu);
        Py_XDECREF(number);
        if (!good) return nullptr;
        cpus.push_back(static_cast<int>(cpu));
    }
    PoolInfo info;
    const bool done = without_gil([&] {
        info.limits = cpu_limits(root, std::move(cpus));
        info.threads = default_threads(info.limits, &info.why);
    });
    return done ? describe(info, false) : nullptr;
}

// Tasks that keep their thread busy for a time and note which one it was.
class Probe : public Work {
  public:
    Probe(int phases, int tasks, std::chrono::nanoseconds task_time)
        : phases_(phases), tasks_(tasks), task_time_(task_time), ran_by_(size_t(phases) * size_t(tasks)) {}

    int phases() const override { return phases_; }
    int64_t tasks(int) const override { return tasks_; }
    void run(int phase, int64_t task) override {
        thread_local const long thread = syscall(SYS_gettid);
        const auto end = std::chrono::steady_clock::now() + task_time_;
        ran_by_[size_t(phase) * size_t(tasks_) + size_t(task)] = thread;
        while (std::chrono::steady_clock::now() < end) {
        }
    }

    std::map<long, int64_t> tasks_by_thread() const {
        std::map<long, int64_t> counts;
        for (long thread : ran_by_) counts[thread]++;
        return counts;
    }

  private:
    int phases_, tasks_;
    std::chrono::nanoseconds task_time_;
    std::vector<long> ran_by_;
};

std::unique_ptr<Probe> parse_probe(PyObject* args) {
    PyObject *phases_object, *tasks_object, *nanoseconds_object;
    int phases, tasks;
    uint64_t nanoseconds;
    if (!PyArg_ParseTuple(args, "OOO:pool_probe", &phases_object, &tasks_object, &nanoseconds_object) ||
        !as_count(phases_object, "phases", kMostProbeTasks, &phases) ||
        !as_count(tasks_object, "tasks", kMostProbeTasks / phases, &tasks) ||
        !as_unsigned(nanoseconds_object, "task_ns", 60'000'000'000, &nanoseconds)) {
        return nullptr;
    }
    try {
        return std::make_unique<Probe>(phases, tasks, std::chrono::nanoseconds(nanoseconds));
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return nullptr;
    }
}

PyObject* py_pool_probe(PyObject*, PyObject* args) {
    const std::unique_ptr<Probe> probe = parse_probe(args);
    if (probe == nullptr) return nullptr;
    double seconds = 0;
    std::map<long, int64_t> counts;
    const bool done = without_gil([&] {
        const auto began = std::chrono::steady_clock::now();
        run(*probe);
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        counts = probe->tasks_by_thread();
    });
    if (!done) return nullptr;
    PyObject* dict = PyDict_New();
    for (const auto& [thread, tasks] : counts) {
        PyObject* key = dict == nullptr ? nullptr : PyLong_FromLong(thread);
        PyObject* value = key == nullptr ? nullptr : PyLong_FromLongLong(tasks);
        if (value == nullptr || PyDict_SetItem(dict, key, value) != 0) Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return dict == nullptr ? nullptr : Py_BuildValue("dN", seconds, dict);
}

void destroy_job(PyObject* capsule) {
    delete static_cast<std::shared_ptr<Job>*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
}

PyObject* py_pool_probe_submit(PyObject*, PyObject* args) {
    std::unique_ptr<Probe> probe = parse_probe(args);
    if (probe == nullptr) return nullptr;
    std::unique_ptr<std::shared_ptr<Job>> job;
    if (!without_gil([&] { job = std::make_unique<std::shared_ptr<Job>>(submit(std::move(probe))); })) return nullptr;
    PyObject* capsule = PyCapsule_New(job.get(), "moert.job", destroy_job);
    if (capsule != nullptr) job.release();
    return capsule;
}

}  // namespace

PyMethodDef pool_methods[] = {
    {"threads", py_threads, METH_NOARGS,
     "threads() -> int\n\nHow many threads compute: what set_threads asked for, else MOERT_THREADS if that is set, "
     "else "
     "one for each physical core that this process may run on and that a cgroup's quota keeps busy. Starts none."},
    {"set_threads", py_set_threads, METH_O,
     "set_threads(n) -> int\n\nComputes with n threads from now on, or with None the default, and returns how many "
     "there "
     "are. RuntimeError while jobs are running or queued."},
    {"stop_threads", py_stop_threads, METH_NOARGS,
     "stop_threads()\n\nFor the exit of the interpreter: returns once no task runs and none will start. Unfinished "
     "jobs "
     "stay so; new work, and waiting for unfinished, is a RuntimeError from now on. Does nothing in a fork."},
    {"pool_info", py_pool_info, METH_NOARGS,
     "pool_info() -> dict\n\nthreads, why (what decided their number), workers (started by now), and as of cpu_limits: "
     "allowed_cpus, physical_cores, quota_cpus, quota_source, numa_nodes."},
    {"cpu_limits", py_cpu_limits, METH_VARARGS,
     "cpu_limits(root, cpus) -> dict\n\nWhat a process that may run on `cpus` would use where `root` stands for \"/\": "
     "threads and why, and the numbers behind them. quota_cpus and quota_source are None without a quota; numa_nodes "
     "has a list of CPUs for each node."},
    {"pool_probe", py_pool_probe, METH_VARARGS,
     "pool_probe(phases, tasks, task_ns) -> (float, dict[int, int])\n\nFor tests: runs tasks that only keep their "
     "thread busy for task_ns, `tasks` of them in each phase. The seconds it took, and tasks by native thread id."},
    {"pool_probe_submit", py_pool_probe_submit, METH_VARARGS,
     "pool_probe_submit(phases, tasks, task_ns) -> capsule\n\nFor tests: submits what pool_probe runs, for job_ready "
     "and job_wait."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace moert
