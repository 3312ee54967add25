# Compiles csrc/ without setup.py: the programs tests/native/*_check.cpp, and the extension for a sanitiser. From the
# root of the tree, everything into BUILD:
#   make -f tests/native/native.mk BUILD=build/native run
# RUN goes before each program (an emulator), LINK to the linker; FLAGS are those of setup.py unless given.

FLAGS ?= -O3 -fvisibility=hidden -Wall -Wextra
ALWAYS := -std=c++17 -ffp-contract=off -fPIC -pthread -Icsrc -MMD

FACE := $(filter csrc/module.cpp csrc/py%,$(wildcard csrc/*.cpp))
PARTS := $(filter-out $(FACE),$(wildcard csrc/*.cpp))
CHECKS := $(patsubst tests/native/%.cpp,$(BUILD)/%,$(wildcard tests/native/*_check.cpp))
object = $(patsubst csrc/%.cpp,$(BUILD)/csrc/%.o,$(1))

.PHONY: run checks objects
run: $(addsuffix .run,$(CHECKS))
checks: $(CHECKS)
objects: $(call object,$(PARTS) $(FACE))

.PHONY: $(addsuffix .run,$(CHECKS))
$(addsuffix .run,$(CHECKS)): %.run: %
	$(RUN) $<

$(call object,$(FACE)): INCLUDE = -DPy_LIMITED_API=0x030A0000 -I$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
$(BUILD)/csrc/%.o: csrc/%.cpp
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(ALWAYS) $(INCLUDE) -c $< -o $@

$(BUILD)/%_check.o: tests/native/%_check.cpp
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(ALWAYS) -c $< -o $@

$(CHECKS): %: %.o $(call object,$(PARTS))
	$(CXX) $(FLAGS) $(LINK) -pthread $^ -o $@

$(BUILD)/package/moert/_C.abi3.so: $(call object,$(PARTS) $(FACE))
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -shared -pthread $^ -o $@
	ln -sfn $(addprefix $(CURDIR)/,$(filter-out %.so,$(wildcard moert/*)) kernels predictors) $(@D)/

-include $(wildcard $(BUILD)/*.d $(BUILD)/csrc/*.d)
